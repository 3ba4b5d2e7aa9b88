"""Recordings of people in motion, and what is made of them for training: prepared folders of clips.

``prepare`` (or ``python -m ikem_fast.data prepare``) makes a folder from a dataset's files, ``prepare_synthetic`` from
nothing; ``ClipSet.open`` reads it, and ``open_source`` gives its clips to training. ``readers`` holds one file per
dataset.
"""

from __future__ import annotations

from ikem_fast.data.clip_set import Batch, ClipSet
from ikem_fast.data.listing import BadFile
from ikem_fast.data.pipeline import Summary, prepare
from ikem_fast.data.preprocess import prepare_clip
from ikem_fast.data.readers import READERS, DataError
from ikem_fast.data.sources import ResidentClips, StoredBatch, StreamingClips, open_source
from ikem_fast.data.synthetic import prepare_synthetic

__all__ = [
    "READERS",
    "BadFile",
    "Batch",
    "ClipSet",
    "DataError",
    "ResidentClips",
    "StoredBatch",
    "StreamingClips",
    "Summary",
    "open_source",
    "prepare",
    "prepare_clip",
    "prepare_synthetic",
]
