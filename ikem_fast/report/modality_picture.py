"""One clip in all its modalities, as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from ikem_fast.layouts import Layout
from ikem_fast.report.drawing import BODY, COLOURS, FAINT, INK, SOFT, colour_name
from ikem_fast.report.skeleton import arrow_starts, arrows, by_frame, project, typical_length

_MAGNITUDES = LinearSegmentedColormap.from_list("magnitudes", ["#f5f7fa", "#a8d5e5", "#3f8fc4", "#5b3a8e", "#2d0a3f"])
_ARROWS = LinearSegmentedColormap.from_list("arrows", ["#5aa9d6", "#6a51a3", "#c51b8a", "#e8590c"])
# What a modality's vectors are, for the row of its picture.
MODALITY_NOTES = {
    "joint": "position of every joint",
    "motion": "velocity of every joint",
    "bone": "from a joint's parent to the joint; root: normal of the chest",
    "acceleration": "change of the velocity",
    "rotation_axis": "cross product of a bone and the bone before it",
    "angular_velocity": "change of the angle between the two bones, along their axis",
}


def modality_picture(modalities: np.ndarray, names: Sequence[str], layout: Layout, num_columns: int = 6) -> Figure:
    """One clip in all its modalities: a row each, with frames along the row and a map of joints by frames at its end.

    In the rows of all modalities but "joint" the body is faint and the modality's vectors are arrows, coloured by
    their length; arrows are scaled per row. Persons that are not in the clip are left out.

    Args:
        modalities: (S, 3, T, V, M), one row being the joints themselves.
        names: S names.
        layout: the skeleton.
        num_columns: frames that are drawn.
    """
    array = by_frame(modalities, names.index("joint"))
    joints = array[names.index("joint")]
    num_frames = joints.shape[0]
    frames = np.unique(np.linspace(0.06 * num_frames, 0.9 * num_frames, num_columns).astype(int))
    flat = project(joints)
    low, high = flat[frames].reshape(-1, 2).min(axis=0), flat[frames].reshape(-1, 2).max(axis=0)
    height = max((high - low).max(), 1e-6)
    margin = 0.16 * height
    aspect = (high[1] - low[1] + 2 * margin) / (high[0] - low[0] + 2 * margin)

    # A panel is as wide as the body needs; the map at the end of a row is as wide as two or three panels.
    width = 1.55 / min(max(aspect, 0.75), 1.7)
    figure = Figure(figsize=(width * len(frames) + 3.9, 1.95 * len(names) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.03, wspace=0.01, hspace=0.02)
    grid = figure.add_gridspec(len(names), len(frames) + 1, width_ratios=[width] * len(frames) + [3.3])
    children = [joint for joint, parent in enumerate(layout.bone_parents) if joint != parent]
    parents = [layout.bone_parents[joint] for joint in children]
    for row, name in enumerate(names):
        vectors = array[row]
        lengths = np.linalg.norm(vectors, axis=-1)
        typical = typical_length(vectors)
        drawn, starts = arrows(vectors, name, layout, height), arrow_starts(joints, name, layout)
        norm = Normalize(0, typical)
        for column, frame in enumerate(frames):
            axes = figure.add_subplot(grid[row, column])
            axes.set_aspect("equal")
            axes.set_xlim(low[0] - margin, high[0] + margin)
            axes.set_ylim(low[1] - margin, high[1] + margin)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines:
                axes.spines[side].set_visible(False)
            if row == len(names) - 1:
                axes.set_xlabel(f"frame {frame + 1}", fontsize=8.5, color=SOFT)
            if column == 0:
                axes.set_ylabel(
                    name.replace("_", " "),
                    fontsize=11,
                    color=COLOURS[colour_name(name)][0],
                    fontweight="bold",
                    labelpad=5,
                )
            for person in range(joints.shape[1]):
                points = flat[frame, person]
                segments = np.stack([points[parents], points[children]], axis=1)
                if name == "joint":
                    colour = COLOURS["joint"][0]
                    axes.add_collection(LineCollection(segments, colors=colour, linewidths=1.8, capstyle="round"))
                    axes.scatter(*points.T, s=9, color="white", edgecolors=INK, linewidths=0.8, zorder=3)
                    continue
                axes.add_collection(LineCollection(segments, colors=BODY, linewidths=1.6, capstyle="round"))
                shown = drawn[frame, person].any(axis=-1)
                axes.quiver(
                    *project(starts[frame, person])[shown].T,
                    *project(drawn[frame, person])[shown].T,
                    lengths[frame, person][shown],
                    cmap=_ARROWS,
                    norm=norm,
                    angles="xy",
                    scale_units="xy",
                    scale=1,
                    units="height",
                    width=0.016,
                    headwidth=3.4,
                    headlength=4,
                    headaxislength=3.6,
                    zorder=3,
                    minlength=0.3,
                )
        axes = figure.add_subplot(grid[row, len(frames)])
        image = axes.imshow(
            lengths[:, 0].T,
            aspect="auto",
            cmap=_MAGNITUDES,
            vmin=0,
            vmax=typical,
            interpolation="nearest",
            origin="lower",
        )
        step = max(1, round(layout.num_joints / 7))
        ticked = range(0, layout.num_joints, step)
        axes.set_yticks(ticked, [layout.joint_names[joint].replace("_", " ") for joint in ticked])
        axes.tick_params(labelsize=6.5, colors=INK, length=2)
        axes.set_title(MODALITY_NOTES.get(name, ""), fontsize=8, color=INK, loc="left", pad=4)
        if row == len(names) - 1:
            axes.set_xlabel("frame; colour: length of the joint's vector", fontsize=8, color=FAINT)
        else:
            axes.set_xticks([])
        for side in axes.spines:
            axes.spines[side].set_visible(False)
        bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=14)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=6.5, colors=INK, length=2)
    return figure
