"""The actions of the synthetic recordings: joint angles as functions of time.

Each action is one function that adds to the poses of one or two persons. Some differ in one respect only: the side
(wave), the direction (arm circles), the order in time (sit down and stand up), the speed (walking and running in
place).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ikem_fast.data.kinematics import Pose


@dataclass(frozen=True)
class Timing:
    """When and how an action happens in one recording.

    Attributes:
        seconds: (F,) time since the action began, negative before it.
        progress: (F,) from 0 before the action to 1 after it.
        tempo: the performer's speed, 1 on average.
        phase: radians, where repeated movements begin.
        repeats: how often short movements are made.
    """

    seconds: np.ndarray
    progress: np.ndarray
    tempo: float
    phase: float
    repeats: int

    def during(self, edge: float = 0.18) -> np.ndarray:
        """0 outside the action, 1 inside it, with smooth flanks that take ``edge`` of its time each."""
        return _smooth(self.progress / edge) * _smooth((1 - self.progress) / edge)

    def swing(self, hertz: float) -> np.ndarray:
        """A sine of a frequency that the performer's tempo changes."""
        return np.sin(2 * np.pi * hertz * self.tempo * self.seconds + self.phase)

    def strokes(self, rise: float = 0.5) -> np.ndarray:
        """``repeats`` times from 0 to 1 and back to 0 over the action; ``rise`` of each stroke's time goes up."""
        position = np.clip(self.progress, 0, 1) * self.repeats % 1.0
        inside = (self.progress > 0) & (self.progress < 1)
        return np.where(inside, _smooth(position / rise) * _smooth((1 - position) / (1 - rise)), 0.0)


def _smooth(ramp: np.ndarray) -> np.ndarray:
    ramp = np.clip(ramp, 0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _wave(pose: Pose, timing: Timing, side: str) -> None:
    up = timing.during()
    pose[f"{side}_shoulder_spread"] += 1.2 * up
    pose[f"{side}_shoulder_twist"] += 1.5 * up
    pose[f"{side}_elbow"] += up * (1.3 + 0.55 * timing.swing(1.6))
    pose[f"{side}_wrist"] += 0.25 * up * timing.swing(1.6)


def wave_right_hand(poses: list[Pose], timing: Timing, side: str) -> None:
    _wave(poses[0], timing, "right")


def wave_left_hand(poses: list[Pose], timing: Timing, side: str) -> None:
    _wave(poses[0], timing, "left")


def clap(poses: list[Pose], timing: Timing, side: str) -> None:
    up, together = timing.during(), timing.swing(2.0)
    for arm in ("left", "right"):
        poses[0][f"{arm}_shoulder_flex"] += 0.75 * up
        poses[0][f"{arm}_elbow"] += 1.25 * up
        poses[0][f"{arm}_shoulder_twist"] += up * (-0.45 - 0.35 * together)


def _arm_circles(pose: Pose, timing: Timing, direction: float) -> None:
    turned = direction * 2 * np.pi * timing.repeats * np.clip(timing.progress, 0, 1)
    for arm in ("left", "right"):
        pose[f"{arm}_shoulder_flex"] += turned
        pose[f"{arm}_shoulder_spread"] += 0.35 * timing.during()


def arm_circles_forwards(poses: list[Pose], timing: Timing, side: str) -> None:
    _arm_circles(poses[0], timing, -1.0)


def arm_circles_backwards(poses: list[Pose], timing: Timing, side: str) -> None:
    _arm_circles(poses[0], timing, 1.0)


def _sit(pose: Pose, sitting: np.ndarray) -> None:
    between = 4 * sitting * (1 - sitting)
    pose["spine_bend"] += 0.1 * sitting + 0.55 * between
    for leg in ("left", "right"):
        pose[f"{leg}_hip_flex"] += 1.45 * sitting
        pose[f"{leg}_knee"] += 1.5 * sitting
        pose[f"{leg}_shoulder_flex"] += 0.35 * sitting + 0.3 * between
        pose[f"{leg}_elbow"] += 0.6 * sitting


def sit_down(poses: list[Pose], timing: Timing, side: str) -> None:
    _sit(poses[0], _smooth(timing.progress))


def stand_up(poses: list[Pose], timing: Timing, side: str) -> None:
    _sit(poses[0], _smooth(1 - timing.progress))


def _step_in_place(pose: Pose, timing: Timing, hertz: float) -> None:
    active, swing = timing.during(0.1), timing.swing(hertz)
    for leg, arm, sign in (("left", "right", 1), ("right", "left", -1)):
        lifted = active * np.maximum(0, sign * swing)
        pose[f"{leg}_hip_flex"] += 0.75 * lifted
        pose[f"{leg}_knee"] += 1.1 * lifted
        pose[f"{arm}_shoulder_flex"] += 0.45 * active * sign * swing
        pose[f"{arm}_elbow"] += 0.6 * active


def walk_in_place(poses: list[Pose], timing: Timing, side: str) -> None:
    _step_in_place(poses[0], timing, 0.85)


def run_in_place(poses: list[Pose], timing: Timing, side: str) -> None:
    _step_in_place(poses[0], timing, 1.7)


def kick(poses: list[Pose], timing: Timing, side: str) -> None:
    stroke, slow = timing.strokes(0.6), timing.during(0.3)
    poses[0][f"{side}_hip_flex"] += 1.35 * stroke**2 - 0.2 * slow
    poses[0][f"{side}_knee"] += 1.3 * stroke * (1 - stroke) * 2 + 0.15 * slow
    poses[0]["spine_bend"] -= 0.2 * stroke
    for arm in ("left", "right"):
        poses[0][f"{arm}_shoulder_spread"] += 0.35 * slow


def shake_hands(poses: list[Pose], timing: Timing, side: str) -> None:
    up, shake = timing.during(0.25), timing.swing(2.2)
    for pose in poses:
        pose["right_shoulder_flex"] += up * (0.7 + 0.1 * shake)
        pose["right_elbow"] += up * (0.7 + 0.22 * shake)
        pose["spine_bend"] += 0.12 * up
    poses[1]["advance"] += 0.15 * up


def push(poses: list[Pose], timing: Timing, side: str) -> None:
    up, stroke = timing.during(0.3), timing.strokes(0.4)
    for arm in ("left", "right"):
        poses[0][f"{arm}_shoulder_flex"] += 0.5 * up + 0.75 * stroke
        poses[0][f"{arm}_elbow"] += 1.7 * up - 1.5 * stroke
    poses[0]["spine_bend"] += 0.25 * stroke
    poses[1]["spine_bend"] -= 0.35 * stroke
    poses[1]["advance"] -= 0.25 * _smooth(timing.progress)
    poses[1][f"{side}_hip_flex"] -= 0.35 * stroke


def jump(poses: list[Pose], timing: Timing, side: str) -> None:
    stroke = timing.strokes()
    flight = np.clip(2 * stroke - 1, 0, 1)
    crouch = 4 * stroke * (1 - stroke)
    poses[0]["rise"] += 0.3 * flight
    poses[0]["spine_bend"] += 0.35 * crouch
    for limb in ("left", "right"):
        poses[0][f"{limb}_hip_flex"] += 0.7 * crouch
        poses[0][f"{limb}_knee"] += 1.2 * crouch
        poses[0][f"{limb}_shoulder_flex"] += 1.6 * flight - 0.4 * crouch


def punch(poses: list[Pose], timing: Timing, side: str) -> None:
    guard, stroke = timing.during(), timing.strokes(0.35)
    sign = 1 if side == "right" else -1
    for arm in ("left", "right"):
        poses[0][f"{arm}_shoulder_flex"] += 0.35 * guard
        poses[0][f"{arm}_elbow"] += 1.9 * guard
    poses[0][f"{side}_shoulder_flex"] += 1.0 * stroke
    poses[0][f"{side}_elbow"] -= 1.7 * stroke
    poses[0]["spine_twist"] += sign * 0.5 * stroke


def bow(poses: list[Pose], timing: Timing, side: str) -> None:
    stroke = timing.strokes()
    poses[0]["spine_bend"] += 1.0 * stroke
    poses[0]["neck_bend"] += 0.4 * stroke


def squat(poses: list[Pose], timing: Timing, side: str) -> None:
    stroke = timing.strokes()
    poses[0]["spine_bend"] += 0.45 * stroke
    for limb in ("left", "right"):
        poses[0][f"{limb}_hip_flex"] += 1.5 * stroke
        poses[0][f"{limb}_knee"] += 2.0 * stroke
        poses[0][f"{limb}_shoulder_flex"] += 1.2 * stroke


def throw(poses: list[Pose], timing: Timing, side: str) -> None:
    back = _smooth(timing.progress / 0.45) * _smooth((0.7 - timing.progress) / 0.2)
    forth = _smooth((timing.progress - 0.5) / 0.2) * _smooth((1 - timing.progress) / 0.3)
    sign = 1 if side == "right" else -1
    poses[0][f"{side}_shoulder_spread"] += 1.3 * back + 0.3 * forth
    poses[0][f"{side}_shoulder_twist"] += 1.4 * back
    poses[0][f"{side}_elbow"] += 1.7 * back + 0.2 * forth
    poses[0][f"{side}_shoulder_flex"] += 1.4 * forth
    poses[0]["spine_twist"] += sign * (0.5 * forth - 0.4 * back)


@dataclass(frozen=True)
class Action:
    """What to do, for how many seconds on average, by how many persons, and how often at most in one recording."""

    name: str
    move: Callable[[list[Pose], Timing, str], None]
    seconds: float
    num_persons: int = 1
    most_repeats: int = 1


ACTIONS = (
    Action("wave right hand", wave_right_hand, 2.4),
    Action("wave left hand", wave_left_hand, 2.4),
    Action("clap", clap, 2.2),
    Action("arm circles forwards", arm_circles_forwards, 2.2, most_repeats=3),
    Action("arm circles backwards", arm_circles_backwards, 2.2, most_repeats=3),
    Action("sit down", sit_down, 1.6),
    Action("stand up", stand_up, 1.6),
    Action("walk in place", walk_in_place, 2.6),
    Action("run in place", run_in_place, 2.6),
    Action("kick", kick, 1.6, most_repeats=2),
    Action("shake hands", shake_hands, 2.4, num_persons=2),
    Action("push", push, 1.8, num_persons=2, most_repeats=2),
    Action("jump", jump, 1.8, most_repeats=3),
    Action("punch", punch, 1.6, most_repeats=3),
    Action("bow", bow, 2.0, most_repeats=2),
    Action("squat", squat, 2.2, most_repeats=2),
    Action("throw", throw, 1.8),
)
ACTION_NAMES = tuple(action.name for action in ACTIONS)
