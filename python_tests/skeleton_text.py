"""NTU text made for tests, line by line, so that a test can damage a known line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BODY_LINE = "72057594037931101 0 1 1 1 1 0 0.0123 -0.2345 2"


def make_lines(bodies_per_frame: Sequence[int], num_joints: int = 25, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """The lines of a file, and the coordinates of all its bodies, (3, F, V, most bodies)."""
    most = max(bodies_per_frame)
    xyz = np.zeros((3, len(bodies_per_frame), num_joints, most))
    values = np.random.default_rng(seed).normal(0, 1, xyz.shape).round(5)
    lines = [str(len(bodies_per_frame))]
    for frame, num_bodies in enumerate(bodies_per_frame):
        lines.append(str(num_bodies))
        for body in range(num_bodies):
            xyz[:, frame, :, body] = values[:, frame, :, body]
            lines += [BODY_LINE, str(num_joints)]
            for joint in range(num_joints):
                point = " ".join(map(repr, values[:, frame, joint, body].tolist()))
                lines.append(f"{point} 251.2 203.9 965.1 537.5 -0.21 0.03 0.97 -0.06 2")
    return lines, xyz


def make_text(bodies_per_frame: Sequence[int], num_joints: int = 25, seed: int = 0) -> str:
    return "\n".join(make_lines(bodies_per_frame, num_joints, seed)[0]) + "\n"
