"""A body of 25 joints that takes poses given by joint angles: the forward kinematics of the synthetic recordings.

Axes are those of the Kinect seen from a person who faces it: x to the person's right, y up, the camera towards -z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_SIDES = ("left", "right")
_TORSO = ("yaw", "rise", "advance", "spine_bend", "spine_twist", "spine_lean", "neck_bend", "neck_twist")
_LIMBS = ("shoulder_flex", "shoulder_spread", "shoulder_twist", "elbow", "wrist", "hip_flex", "hip_spread", "knee")
# Angles in radians; "rise" (height above the ground) and "advance" (forwards) in metres. Positive is: to the front for
# flex, bend and elbow; outwards for spread and twist; for yaw and lean counter-clockwise about +y and +z.
POSE_FIELDS = _TORSO + tuple(f"{side}_{limb}" for side in _SIDES for limb in _LIMBS)
_COLUMNS = {name: column for column, name in enumerate(POSE_FIELDS)}
NUM_JOINTS = 25


class Pose:
    """Angles over time: ``values`` is (F, len(POSE_FIELDS)); a field by its name is a view of (F,)."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    @classmethod
    def rest(cls, num_frames: int) -> Pose:
        return cls(np.zeros((num_frames, len(POSE_FIELDS))))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[:, _COLUMNS[name]]

    def __setitem__(self, name: str, value: np.ndarray | float) -> None:
        self.values[:, _COLUMNS[name]] = value


@dataclass(frozen=True)
class Body:
    """Lengths in metres."""

    lower_spine: float
    upper_spine: float
    neck: float
    head: float
    shoulder_width: float
    upper_arm: float
    forearm: float
    hand: float
    hip_width: float
    thigh: float
    shin: float
    foot: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> Body:
        """A body of 1.5 to 1.95 m with proportions of its own."""
        height = generator.uniform(1.5, 1.95)
        shares = {
            "lower_spine": 0.155,
            "upper_spine": 0.145,
            "neck": 0.045,
            "head": 0.075,
            "shoulder_width": 0.205,
            "upper_arm": 0.160,
            "forearm": 0.145,
            "hand": 0.045,
            "hip_width": 0.100,
            "thigh": 0.235,
            "shin": 0.230,
            "foot": 0.070,
        }
        return cls(**{name: height * share * generator.uniform(0.92, 1.08) for name, share in shares.items()})


def _rotations(angles: np.ndarray, axis: int) -> np.ndarray:
    """(F, 3, 3) counter-clockwise rotations about axis 0, 1 or 2."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrices = np.zeros((len(angles), 3, 3))
    cosine, sine = np.cos(angles), np.sin(angles)
    matrices[:, axis, axis] = 1
    matrices[:, first, first] = matrices[:, second, second] = cosine
    matrices[:, first, second] = -sine
    matrices[:, second, first] = sine
    return matrices


def place_joints(body: Body, pose: Pose) -> np.ndarray:
    """(F, 25, 3) joints in NTU's order, metres; the ground is y = 0, and the lower foot stands ``rise`` above it."""
    joints = np.zeros((len(pose.values), NUM_JOINTS, 3))
    x, y, z = np.eye(3)
    pelvis = _rotations(pose["yaw"], 1)
    lower_back = pelvis @ _rotations(-pose["spine_bend"] / 2, 0) @ _rotations(pose["spine_lean"] / 2, 2)
    chest = (
        lower_back
        @ _rotations(-pose["spine_bend"] / 2, 0)
        @ _rotations(pose["spine_lean"] / 2, 2)
        @ _rotations(pose["spine_twist"], 1)
    )
    skull = chest @ _rotations(-pose["neck_bend"], 0) @ _rotations(pose["neck_twist"], 1)

    joints[:, 1] = lower_back @ y * body.lower_spine
    joints[:, 20] = joints[:, 1] + chest @ y * body.upper_spine
    joints[:, 2] = joints[:, 20] + chest @ y * body.neck
    joints[:, 3] = joints[:, 2] + skull @ (y * body.head - z * 0.2 * body.head)

    for side, sign, shoulder, tip, hip in (("left", -1, 4, 21, 12), ("right", 1, 8, 23, 16)):
        spread = _rotations(sign * pose[f"{side}_shoulder_spread"], 2)
        flex = _rotations(pose[f"{side}_shoulder_flex"], 0)
        twist = _rotations(-sign * pose[f"{side}_shoulder_twist"], 1)
        upper_arm = chest @ spread @ flex @ twist
        forearm = upper_arm @ _rotations(pose[f"{side}_elbow"], 0)
        hand = forearm @ _rotations(pose[f"{side}_wrist"], 0)
        joints[:, shoulder] = joints[:, 20] + chest @ (
            sign * x * body.shoulder_width / 2 - y * 0.12 * body.shoulder_width
        )
        joints[:, shoulder + 1] = joints[:, shoulder] - upper_arm @ y * body.upper_arm
        joints[:, shoulder + 2] = joints[:, shoulder + 1] - forearm @ y * body.forearm
        joints[:, shoulder + 3] = joints[:, shoulder + 2] - hand @ y * body.hand
        joints[:, tip] = joints[:, shoulder + 3] - hand @ y * body.hand
        joints[:, tip + 1] = joints[:, shoulder + 2] - hand @ (y * 0.8 * body.hand + z * 0.6 * body.hand)

        thigh = pelvis @ _rotations(sign * pose[f"{side}_hip_spread"], 2) @ _rotations(pose[f"{side}_hip_flex"], 0)
        shin = thigh @ _rotations(-pose[f"{side}_knee"], 0)
        joints[:, hip] = pelvis @ (sign * x * body.hip_width / 2 - y * 0.02)
        joints[:, hip + 1] = joints[:, hip] - thigh @ y * body.thigh
        joints[:, hip + 2] = joints[:, hip + 1] - shin @ y * body.shin
        joints[:, hip + 3] = joints[:, hip + 2] - shin @ (y * 0.4 * body.foot + z * 0.9 * body.foot)

    ground = joints[:, [14, 15, 18, 19], 1].min(axis=1)
    joints[:, :, 1] += (pose["rise"] - ground)[:, None]
    joints += (pelvis @ -z)[:, None] * pose["advance"][:, None, None]
    return joints
