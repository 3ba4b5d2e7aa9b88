"""Chosen clips: as skeletons that move, with the vectors of a modality, and as pictures of all six modalities."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ikem_fast.data import ClipSet
from ikem_fast.layouts import Layout
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops import derive_modalities
from ikem_fast.report import page
from ikem_fast.report.drawing import colour_name, css_colour, draw_svg
from ikem_fast.report.modality_picture import modality_picture
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material, ReportError, evenly_spaced
from ikem_fast.report.skeleton import PITCH, YAW, arrow_starts, arrows, by_frame, project

SCRIPT = "player.js"
_NUM_CHOSEN = 3
_MOST_SEARCHED = 200
_MOST_FRAMES = 100
_MILLIMETRES = 1000


def render(material: Material) -> list[Section]:
    chosen = _choose(material)
    if not chosen:
        return []
    derived = [_derive(clip_set, index) for clip_set, index in chosen]
    players = (
        player(clip_set, index, modalities) for (clip_set, index), modalities in zip(chosen, derived, strict=True)
    )
    # Pictures are large; of clips that nobody asked for one is enough.
    pictured = list(zip(chosen, derived, strict=True))[: len(material.samples) or 1]
    pictures = []
    for (clip_set, index), modalities in pictured:
        name = clip_set.names[index]
        figure = modality_picture(modalities, MODALITIES, clip_set.layout)
        pictures.append(page.heading(f"{name}, {_action(clip_set, index)}"))
        pictures.append(page.wide_picture(draw_svg(figure), f"six modalities of {name}"))
    return [
        Section(
            "Clips",
            (
                page.paragraph(
                    "Prepared clips, as the encoders read them before augmentation. Drag a skeleton to turn it, or use "
                    "the arrow keys; space plays and stops. Vectors are scaled to be seen."
                ),
                f'<div class="panels">{"".join(players)}</div>',
            ),
            (SCRIPT,),
        ),
        Section(
            "The six modalities",
            (
                page.paragraph(
                    "Arrows are the vectors that the encoders see, scaled per row and coloured by their length; on the "
                    "right the length of every joint's vector in every frame."
                ),
                *pictures,
            ),
        ),
    ]


def _choose(material: Material) -> list[tuple[ClipSet, int]]:
    """The clips that were asked for, or some lively ones of different actions."""
    clip_sets = material.clip_sets()
    if not material.samples:
        return [(clip_sets[0], index) for index in lively_clips(clip_sets[0], _NUM_CHOSEN)] if clip_sets else []
    if not clip_sets:
        raise material.data_problems()[0]
    chosen = []
    for sample in material.samples:
        found = [(clip_set, clip_set.names.index(sample)) for clip_set in clip_sets if sample in clip_set.names]
        if not found:
            folders = " or ".join(str(clip_set.folder) for clip_set in clip_sets)
            raise ReportError(f"sample must be the name of a clip in {folders}, got '{sample}'")
        chosen.append(found[0])
    return chosen


def lively_clips(clip_set: ClipSet, number: int) -> list[int]:
    """Positions of clips of different actions that move more than most but are no outliers, undamaged if possible."""
    candidates = np.flatnonzero(clip_set.splits == "test")
    if len(candidates) == 0:
        candidates = np.arange(len(clip_set))
    whole = candidates[clip_set.valid_frames[candidates] == clip_set.num_frames[candidates]]
    candidates = whole if len(whole) else candidates
    some = candidates[evenly_spaced(len(candidates), _MOST_SEARCHED)]
    clips = clip_set.batch(some).clips
    speed = (clips[:, :, 1:] - clips[:, :, :-1]).norm(dim=1).mean(dim=(1, 2, 3)).nan_to_num().numpy()
    by_speed = some[np.argsort(speed, kind="stable")]
    best = int(0.8 * (len(some) - 1))
    chosen: dict[int, int] = {}
    for place in sorted(range(len(some)), key=lambda place: abs(place - best)):
        chosen.setdefault(int(clip_set.labels[by_speed[place]]), int(by_speed[place]))
    return list(chosen.values())[:number]


def _derive(clip_set: ClipSet, index: int) -> np.ndarray:
    """(6, 3, T, V, M), with the frame count of the file as the time scale."""
    batch = clip_set.batch([index])
    return derive_modalities(batch.clips, batch.num_frames, clip_set.layout, MODALITIES)[:, 0].numpy()


def _action(clip_set: ClipSet, index: int) -> str:
    return f"“{clip_set.class_names[int(clip_set.labels[index])]}”"


def player(clip_set: ClipSet, index: int, modalities: np.ndarray) -> str:
    """A clip as a figure with its first frame drawn, which the script sets in motion."""
    name, action = clip_set.names[index], _action(clip_set, index)
    clip = animation(modalities, clip_set.layout)
    width, height = clip["size"]
    first = np.array(clip["positions"]).reshape(clip["frames"], clip["persons"], clip["joints"], 3)[0]
    bodies = "".join(_body(points, clip) for points in first)
    options = "".join(f'<option value="{each}">{each.replace("_", " ")}</option>' for each in MODALITIES)
    return (
        f'<figure class="player"><figcaption>{escape(name)}, {escape(action)}</figcaption>'
        f'<svg viewBox="{-width} {-height} {2 * width} {2 * height}" role="img" tabindex="0" '
        f'aria-label="skeleton of {escape(name)}, {escape(action)}">{bodies}</svg>'
        '<div class="controls" hidden><button type="button">Play</button>'
        f'<input type="range" min="0" max="{clip["frames"] - 1}" value="0" aria-label="frame">'
        f"<output>1 / {clip['frames']}</output></div>"
        f'<div class="controls" hidden><label>vectors <select>{options}</select></label></div>'
        f"{page.data(clip)}</figure>"
    )


def animation(modalities: np.ndarray, layout: Layout, names: Sequence[str] = MODALITIES) -> dict[str, Any]:
    """What the script needs to draw a clip from any side: whole millimetres, at most 100 frames, whoever is there.

    Args:
        modalities: (S, 3, T, V, M).
        layout: the skeleton.
        names: S names, "joint" among them.

    Returns:
        plain values: ``frames`` T, ``persons`` M, ``joints`` V; ``positions`` and, by modality, ``vectors`` as they are
        drawn, T * M * V * 3 numbers each; ``starts``, by modality the joint each joint's vector begins at; ``centre``
        of the picture, its half ``size`` and the first ``view`` (yaw, pitch); ``colours``.
    """
    array = by_frame(modalities, names.index("joint"))
    array = array[:, evenly_spaced(array.shape[1], _MOST_FRAMES)]
    joints = array[names.index("joint")]
    # A frame without a person is all zeros and shall not make the picture larger.
    seen = joints[np.abs(joints).max(axis=(2, 3)) > 0].reshape(-1, 3)
    seen = seen if len(seen) else joints.reshape(-1, 3)
    centre = (seen.min(axis=0) + seen.max(axis=0)) / 2
    from_centre = seen - centre
    across = np.hypot(from_centre[:, 0], from_centre[:, 2]).max()
    upright = np.abs(from_centre[:, 1]).max()
    body = max(2 * upright, across, 1e-3)
    # Room for arrows, and for the view from above.
    size = [1.12 * across + 0.1 * body, 1.12 * upright + 0.1 * body + np.sin(2 * PITCH) * across]
    joint_numbers = np.arange(layout.num_joints)[:, None]
    return {
        "frames": joints.shape[0],
        "persons": joints.shape[1],
        "joints": joints.shape[2],
        "parents": list(layout.bone_parents),
        "positions": _millimetres(joints),
        "vectors": {
            name: _millimetres(arrows(array[row], name, layout, body))
            for row, name in enumerate(names)
            if name != "joint"
        },
        "starts": {name: arrow_starts(joint_numbers, name, layout)[:, 0].tolist() for name in names if name != "joint"},
        "centre": _millimetres(centre),
        "size": [max(1, value) for value in _millimetres(np.array(size))],
        "view": [round(YAW, 4), round(PITCH, 4)],
        "colours": {name: css_colour(colour_name(name)) for name in names},
    }


def _millimetres(metres: np.ndarray) -> list[int]:
    return np.nan_to_num(np.rint(_MILLIMETRES * metres)).astype(int).ravel().tolist()


def _body(points: np.ndarray, clip: dict[str, Any]) -> str:
    """A person's paths: bones, joints, and a place for arrows; the script writes the same ones for other frames."""
    flat = np.rint(project(points - np.array(clip["centre"]))).astype(int) * [1, -1]
    bones = dots = ""
    if points.any():
        bones = "".join(
            f"M{flat[parent][0]} {flat[parent][1]}L{flat[joint][0]} {flat[joint][1]}"
            for joint, parent in enumerate(clip["parents"])
            if joint != parent
        )
        dots = "".join(f"M{x} {y}h0" for x, y in flat)
    return (
        f'<g><path stroke="{clip["colours"]["joint"]}" stroke-width="26" d="{bones}"/>'
        f'<path stroke="{css_colour("ink")}" stroke-width="36" d="{dots}"/><path stroke-width="14" d=""/></g>'
    )
