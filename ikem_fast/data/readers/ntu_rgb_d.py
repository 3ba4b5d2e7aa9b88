"""NTU RGB+D and NTU RGB+D 120: ``SsssCcccPpppRrrrAaaa.skeleton`` text files, 25 joints, up to two persons kept."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ikem_fast import _extension
from ikem_fast.data.readers.base import Protocol, Reader, Sample
from ikem_fast.layouts import Layout

MAX_FRAMES = 300
_NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})\.skeleton", re.ASCII)

XSUB_60_TRAINING = frozenset((1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38))
_XSUB_120_TRAINING = XSUB_60_TRAINING | {
    *(45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78, 80, 81, 82, 83, 84, 85, 86, 89),
    *(91, 92, 93, 94, 95, 97, 98, 100, 103),
}
_XVIEW_60_TRAINING = frozenset((2, 3))

_ACTIONS = """
drink water; eat meal; brush teeth; brush hair; drop; pick up; throw; sit down; stand up; clapping; reading;
writing; tear up paper; put on jacket; take off jacket; put on a shoe; take off a shoe; put on glasses;
take off glasses; put on a hat; take off a hat; cheer up; hand waving; kicking something; reach into pocket;
hopping; jump up; phone call; play with phone; type on a keyboard; point to something; take a selfie;
check time from watch; rub two hands; nod head or bow; shake head; wipe face; salute; put palms together;
cross hands in front; sneeze or cough; staggering; falling down; headache; chest pain; back pain; neck pain;
nausea or vomiting; fan self; punch or slap; kicking; pushing; pat on back; point finger; hugging;
giving object; touch pocket; shaking hands; walking towards; walking apart; put on headphone;
take off headphone; shoot at basket; bounce ball; tennis bat swing; juggle table tennis ball; hush;
flick hair; thumb up; thumb down; make OK sign; make victory sign; staple book; counting money; cutting nails;
cutting paper; snap fingers; open bottle; sniff or smell; squat down; toss a coin; fold paper; ball up paper;
play magic cube; apply cream on face; apply cream on hand; put on bag; take off bag; put object into bag;
take object out of bag; open a box; move heavy objects; shake fist; throw up cap or hat; capitulate;
cross arms; arm circles; arm swings; run on the spot; butt kicks; cross toe touch; side kick; yawn;
stretch oneself; blow nose; hit with object; wield knife; knock over; grab stuff; shoot with gun;
step on foot; high-five; cheers and drink; carry object; take a photo; follow; whisper; exchange things;
support somebody; rock-paper-scissors
"""
ACTION_NAMES = tuple(name.strip() for name in _ACTIONS.split(";"))


def parse_name(file_name: str) -> Sample | None:
    """The sample of ``SsssCcccPpppRrrrAaaa.skeleton``: setup, camera, performer, replication, action."""
    match = _NAME.fullmatch(file_name)
    if match is None:
        return None
    setup, camera, performer, replication, action = map(int, match.groups())
    if not 1 <= action <= len(ACTION_NAMES):
        return None
    return Sample(Path(file_name).stem, action - 1, performer, camera, setup, replication)


def read(path: Path, layout: Layout) -> np.ndarray:
    """(3, F, V, 2) float64: the first two bodies of each frame in file order."""
    return _extension.require().parse_skeleton(str(path), layout.num_joints, 2, MAX_FRAMES)[0]


def is_cross_subject_60_training(sample: Sample) -> bool:
    return sample.subject in XSUB_60_TRAINING


def is_cross_view_60_training(sample: Sample) -> bool:
    return sample.camera in _XVIEW_60_TRAINING


def _is_ntu_60(sample: Sample) -> bool:
    return sample.label < 60


READER = Reader(
    kind="ntu-rgb+d",
    layout="ntu-rgb+d",
    num_persons=2,
    protocols={
        "ntu60-xsub": Protocol(
            "actions 1-60; 20 of 40 performers train", ACTION_NAMES[:60], is_cross_subject_60_training, _is_ntu_60
        ),
        "ntu60-xview": Protocol(
            "actions 1-60; cameras 2 and 3 train", ACTION_NAMES[:60], is_cross_view_60_training, _is_ntu_60
        ),
        "ntu120-xsub": Protocol(
            "actions 1-120; 53 of 106 performers train",
            ACTION_NAMES,
            lambda sample: sample.subject in _XSUB_120_TRAINING,
        ),
        "ntu120-xset": Protocol("actions 1-120; even setups train", ACTION_NAMES, lambda sample: sample.setup % 2 == 0),
    },
    suffix=".skeleton",
    name_pattern="SsssCcccPpppRrrrAaaa.skeleton with action 001 to 120",
    parse_name=parse_name,
    read=read,
)
