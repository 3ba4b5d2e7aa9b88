"""Figures of the report page, each a function from plain arrays to a matplotlib figure; none touches a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from ikem_fast.layouts import Layout

_PIXELS_PER_INCH = 92
INK = "#1f2933"
FAINT = "#9aa5b1"
GRID = "#e4e7eb"
# One colour per modality, the same in every figure (colour-blind safe, after Okabe and Ito).
MODALITY_COLOURS = {
    "joint": "#0072b2",
    "motion": "#e69f00",
    "bone": "#009e73",
    "acceleration": "#d55e00",
    "rotation_axis": "#cc79a7",
    "angular_velocity": "#56b4e9",
    "all": "#1f2933",
    "joint+motion+bone": "#7b8794",
}
_OTHER_COLOURS = ("#6b4c9a", "#948b3d", "#3e9651", "#922428")
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


def colour_of(name: str, position: int = 0) -> str:
    """The colour of a modality in every figure; names that are none take one by their position."""
    return MODALITY_COLOURS.get(name, _OTHER_COLOURS[position % len(_OTHER_COLOURS)])


@dataclass(frozen=True)
class Png:
    """A drawn figure: its PNG in base64, for a ``data:`` address, and the width in pixels it is meant for."""

    base64: str
    width: int


def draw(figure: Figure, dots_per_inch: int = 130) -> Png:
    """Draws a figure; shown in its width all figures have letters of the same size, on sharp screens too."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white")
    return Png(base64.b64encode(buffer.getvalue()).decode("ascii"), round(_PIXELS_PER_INCH * figure.get_figwidth()))


def _plain(axes) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=8, length=3)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over an odd number of values; at both ends over those there are."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def loss_curves(losses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """One panel per kind of loss (``single``, ``context``, ``exchange``, ``distill``), one line per modality.

    Args:
        losses: ``kind/modality`` to (steps, values). Values as logged are drawn faint, their running mean on top.
    """
    kinds = list(dict.fromkeys(name.split("/")[0] for name in losses))
    titles = {
        "single": "stage 1: contrast within a modality",
        "context": "stage 2: context exchange",
        "exchange": "stage 2: implicit exchange",
        "distill": "relational distillation",
    }
    figure = Figure(figsize=(3.85 * len(kinds), 3.1), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        _plain(axes)
        members = [name for name in losses if name.split("/")[0] == kind]
        for position, name in enumerate(members):
            steps, values = (np.asarray(part, dtype=float) for part in losses[name])
            modality = name.split("/", 1)[-1]
            colour = colour_of(modality, position)
            axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(
                steps,
                _smooth(values, 2 * (len(values) // 50) + 1),
                color=colour,
                linewidth=1.6,
                label=modality.replace("_", " "),
            )
        axes.set_title(titles.get(kind, kind), fontsize=9.5, color=INK, loc="left")
        axes.set_xlabel("step", fontsize=8.5, color=INK)
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def accuracy_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], chance: float | None = None) -> Figure:
    """kNN accuracy along the training: name to (epochs, accuracies in [0, 1]); a dashed line at ``chance``."""
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    for position, (name, (epochs, values)) in enumerate(curves.items()):
        axes.plot(
            epochs,
            100 * np.asarray(values, dtype=float),
            color=colour_of(name, position),
            linewidth=1.8,
            marker="o",
            markersize=3.5,
            label=name.replace("_", " "),
        )
    if chance is not None:
        axes.axhline(100 * chance, color=FAINT, linestyle="--", linewidth=1)
        axes.annotate(
            "chance",
            (1, 100 * chance),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=7.5,
            color=FAINT,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch", fontsize=8.5, color=INK)
    axes.set_ylabel("kNN accuracy (%)", fontsize=8.5, color=INK)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7.5, frameon=False, labelcolor=INK
    )
    return figure


def accuracy_bars(groups: Mapping[str, Mapping[str, float]], chance: float | None = None) -> Figure:
    """Bars of accuracy per view, one colour per encoder: encoder to (view to accuracy in [0, 1])."""
    views = dict.fromkeys(view for rows in groups.values() for view in rows)
    views = sorted(views, key=lambda view: (view == "all", "+" in view))
    colours = ("#0072b2", "#e69f00", "#b8c1cc", "#8a94a0")
    figure = Figure(figsize=(max(6.0, 1.25 * len(views)), 3.2), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    axes.grid(False, axis="x")
    for number, view in enumerate(views):
        here = [(position, rows[view]) for position, rows in enumerate(groups.values()) if view in rows]
        width = 0.8 / len(groups)
        for place, (position, value) in enumerate(here):
            centre = number + (place - (len(here) - 1) / 2) * width
            axes.bar(centre, 100 * value, 0.92 * width, color=colours[position % len(colours)], zorder=2)
            axes.annotate(f"{100 * value:.0f}", (centre, 100 * value), ha="center", va="bottom", fontsize=7, color=INK)
    for position, name in enumerate(groups):
        axes.bar(0, 0, color=colours[position % len(colours)], label=name)
    if chance is not None:
        axes.axhline(100 * chance, color=INK, linestyle=":", linewidth=1, zorder=3)
    labels = [view.replace("_", "\n").replace("+", " +\n") for view in views]
    axes.set_xticks(range(len(views)), labels, fontsize=8, color=INK)
    axes.set_ylim(0, 105)
    axes.set_ylabel("linear accuracy (%)", fontsize=8.5, color=INK)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=len(groups),
        fontsize=8,
        frameon=False,
        labelcolor=INK,
    )
    return figure


def confusion(matrix: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Confusion matrix, rows normalised: (classes, classes) counts with the true class down.

    Up to 30 classes every cell of 1 % or more is written out, beyond that the picture stands alone.
    """
    counts = np.asarray(matrix, dtype=float)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(class_names)
    side = min(13.0, 2.8 + 0.38 * size)
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap=_MAGNITUDES, vmin=0, vmax=1)
    font = 8 if size <= 30 else 5
    axes.set_xticks(range(size), class_names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font, color=INK)
    axes.set_yticks(range(size), class_names, fontsize=font, color=INK)
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for side_name in axes.spines:
        axes.spines[side_name].set_visible(False)
    if size <= 30:
        for row, column in zip(*np.nonzero(share >= 0.01), strict=True):
            axes.text(
                column,
                row,
                f"{100 * share[row, column]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share[row, column] > 0.45 else INK,
            )
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, colors=INK, length=2)
    bar.set_label("share of the true class", fontsize=8, color=INK)
    return figure


def _project(points: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """(..., 3) to (..., 2): seen from a little to the side and above, so that depth shows; x right, y up."""
    x, y, z = np.moveaxis(points, -1, 0)
    right = np.cos(yaw) * x - np.sin(yaw) * z
    depth = np.sin(yaw) * x + np.cos(yaw) * z
    return np.stack([right, np.cos(pitch) * y - np.sin(pitch) * depth], axis=-1)


def modality_picture(modalities: np.ndarray, names: Sequence[str], layout: Layout, num_columns: int = 6) -> Figure:
    """One clip in all its modalities: a row each, with frames along the row and a map of joints by frames at its end.

    In the rows of all modalities but "joint" the body is faint and the modality's vectors are arrows, coloured by
    their length; arrows are scaled per row. Persons that are not in the clip are left out.

    Args:
        modalities: (S, 3, T, V, M), the first row being the joints themselves.
        names: S names.
        layout: the skeleton.
        num_columns: frames that are drawn.
    """
    array = np.asarray(modalities, dtype=float).transpose(0, 2, 4, 3, 1)
    joints = array[names.index("joint")]
    present = [person for person in range(joints.shape[1]) if np.abs(joints[:, person]).max() > 0] or [0]
    array, joints = array[:, :, present], joints[:, present]
    num_frames = joints.shape[0]
    frames = np.unique(np.linspace(0.06 * num_frames, 0.9 * num_frames, num_columns).astype(int))
    yaw, pitch = np.radians(25), np.radians(12)
    flat = _project(joints, yaw, pitch)
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
        typical = np.quantile(lengths[lengths > 0], 0.97) if (lengths > 0).any() else 1.0
        scale = 1.0 if name in ("joint", "bone") else 0.28 * height / typical
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
                axes.set_xlabel(f"frame {frame}", fontsize=8.5, color=FAINT)
            if column == 0:
                axes.set_ylabel(
                    name.replace("_", " "), fontsize=11, color=colour_of(name), fontweight="bold", labelpad=5
                )
            for person in range(joints.shape[1]):
                points = flat[frame, person]
                segments = np.stack([points[parents], points[children]], axis=1)
                if name == "joint":
                    axes.add_collection(
                        LineCollection(segments, colors=MODALITY_COLOURS["joint"], linewidths=1.8, capstyle="round")
                    )
                    axes.scatter(*points.T, s=9, color="white", edgecolors=INK, linewidths=0.8, zorder=3)
                    continue
                axes.add_collection(LineCollection(segments, colors="#cbd2d9", linewidths=1.6, capstyle="round"))
                starts = joints[frame, person]
                size = lengths[frame, person]
                # Single outliers of noisy recordings keep their direction and the length of the typical longest.
                arrows = vectors[frame, person] * (scale * np.minimum(1, typical / np.maximum(size, 1e-12)))[:, None]
                if name == "bone":
                    starts = starts[list(layout.bone_parents)]
                    arrows = vectors[frame, person].copy()
                    arrows[layout.root] *= 0.22 * height / max(size[layout.root], 1e-12)
                shown = size > 0.04 * typical
                axes.quiver(
                    *_project(starts, yaw, pitch)[shown].T,
                    *_project(arrows, yaw, pitch)[shown].T,
                    size[shown],
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
