"""The synthetic recordings of ``ikem_fast.data.synthetic``: NTU's text format and file names, but its own actions."""

from __future__ import annotations

from dataclasses import replace

from ikem_fast.data.motions import ACTION_NAMES
from ikem_fast.data.readers import ntu_rgb_d
from ikem_fast.data.readers.base import Protocol, Reader


def make_reader(num_actions: int = len(ACTION_NAMES)) -> Reader:
    """The reader for recordings of the first ``num_actions`` actions."""
    names = ACTION_NAMES[:num_actions]
    return replace(
        ntu_rgb_d.READER,
        kind="synthetic",
        protocols={
            "xsub": Protocol(
                "the performers that train in ntu60-xsub train",
                names,
                ntu_rgb_d.is_cross_subject_60_training,
                lambda sample: sample.label < num_actions,
            ),
            "xview": Protocol(
                "cameras 2 and 3 train",
                names,
                ntu_rgb_d.is_cross_view_60_training,
                lambda sample: sample.label < num_actions,
            ),
        },
    )


READER = make_reader()
