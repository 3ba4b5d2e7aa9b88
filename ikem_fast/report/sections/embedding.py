"""Features of the test clips in the plane: what the encoders hold to be alike lies close together (t-SNE)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

from ikem_fast.data import ClipSet
from ikem_fast.engine import checkpoints
from ikem_fast.evaluation.features import Features, extract
from ikem_fast.evaluation.knn import fused_features
from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material, RunRecord, clock, evenly_spaced

SCRIPT = "embedding.js"
_MOST_POINTS = 2000
_FEWEST_POINTS = 5
_ALIKE = "the features of all clips are equal or not finite."
_PERPLEXITY = 30
_SEED = 0
_WIDTH = 1000
_MARGIN = 30
# Size of the letters in the plot, as in the page's style, and how wide they are.
_LETTER_HEIGHT, _LETTER = 27, 14.5
# Up to so many actions their names stand in the plot.
_MOST_LABELS = 20
# For a handful of actions, after Paul Tol's bright scheme; seen on white and on black.
_CLASS_COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#c9a227", "#56b4e9"),
    *("#aa3377", "#e07b39", "#8c8c8c", "#44aa99", "#9c6b3f"),
)


def render(material: Material) -> list[Section]:
    if material.embedding is None:
        return []
    figures, notices, seconds = [], [], {"features": 0.0, "t-SNE": 0.0}
    counts: set[int] = set()
    class_names: dict[tuple[str, ...], None] = {}
    for run in material.runs:
        clip_set = material.clip_set_of(run)
        if clip_set is None:
            continue
        begin = time.perf_counter()
        features = _test_features(run, clip_set)
        seconds["features"] += time.perf_counter() - begin
        if isinstance(features, str):
            notices.append(features)
            continue
        begin = time.perf_counter()
        places = {view: tsne(rows) for view, rows in _views(features, every=material.embedding == "modalities").items()}
        seconds["t-SNE"] += time.perf_counter() - begin
        if not places:
            notices.append(f"{run.name}: {_ALIKE}")
            continue
        counts.add(len(features.labels))
        class_names[clip_set.class_names] = None
        figures.append(_figure(run, places, features, clip_set.class_names))
    if not figures:
        return [Section("Embedding", tuple(page.notice(text) for text in notices))] if notices else []
    took = ", ".join(f"{name} {clock(value)}" for name, value in seconds.items())
    numbers = " or ".join(str(count) for count in sorted(counts))
    words = (
        f"t-SNE of the features of {numbers} test clips (“all”: every modality normalised, side by side, as nearest "
        "neighbours see them). A point is a clip, a colour an action; distances between far groups mean nothing. "
        f"Computed for this page: {took}."
    )
    legends = (page.legend((name, class_colour(n, len(of)), "dot") for n, name in enumerate(of)) for of in class_names)
    notes = (page.notice(text) for text in notices)
    inner = f'<div class="panels pairs">{"".join(figures)}</div>'
    return [Section("Embedding", (page.paragraph(words), *notes, *legends, inner), (SCRIPT,))]


def _test_features(run: RunRecord, clip_set: ClipSet) -> Features | str:
    """Features of a run's test clips, or of 2000 of them; or in words, why there is no plot of them."""
    test = np.flatnonzero(clip_set.splits == "test")
    test = test[evenly_spaced(len(test), _MOST_POINTS)]
    if len(test) < _FEWEST_POINTS:
        return f"{run.name}: {len(test)} test clips are too few for a plot."
    method, _checkpoint = checkpoints.load_run(run.folder)
    if clip_set.layout != method.layout:
        return f"{run.name} has another skeleton than the clips, {method.layout.name}."
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = run.config["knn"]["feature_batch_size"]
    features = extract(method.to(device), clip_set.subset(test), batch_size=batch_size, device=device)
    if not torch.isfinite(features.features).all() or features.features.std(dim=1).max() == 0:
        return f"{run.name}: {_ALIKE}"
    return features


def _views(features: Features, every: bool) -> dict[str, Tensor]:
    """Name to (N, D) features: all modalities together, and each alone if asked for; none that are all equal."""
    together = "all" if len(features.names) > 1 else features.names[0]
    views = {together: fused_features(features.features)}
    if every:
        views |= {
            name: fused_features(rows[None]) for name, rows in zip(features.names, features.features, strict=True)
        }
    # Of clips that all look alike to an encoder there is no plot, and scikit-learn crashes over them.
    return {name: rows for name, rows in views.items() if rows.std(dim=0).max() > 0}


def tsne(features: Tensor | np.ndarray) -> np.ndarray:
    """(N, D) features to (N, 2) places from 30 to 970 across, and as far down as they go, the same ones every time.

    Args:
        features: at least 5 rows, finite, not all equal.
    """
    # Takes a second to import, which nobody else shall wait for.
    from sklearn.manifold import TSNE

    array = np.asarray(features, dtype=np.float32)
    perplexity = min(_PERPLEXITY, (len(array) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=_SEED).fit_transform(array)
    # Windows are wide: the longer axis lies level, with signs that do not depend on chance.
    places = places - places.mean(axis=0)
    axes = np.linalg.svd(places, full_matrices=False)[2]
    places = places @ (axes * np.where(axes.sum(axis=1, keepdims=True) < 0, -1, 1)).T
    low, high = places.min(axis=0), places.max(axis=0)
    return _MARGIN + (_WIDTH - 2 * _MARGIN) * (places - low) / max((high - low).max(), 1e-12)


def _figure(run: RunRecord, places: Mapping[str, np.ndarray], features: Features, class_names: Sequence[str]) -> str:
    labels = features.labels.numpy()
    classes = np.unique(labels).tolist()
    order = np.argsort(labels, kind="stable")
    view = next(iter(places))
    radius = 8 if len(labels) <= 600 else 5.5
    groups = []
    for number in classes:
        members = order[labels[order] == number]
        circles = "".join(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="{radius}"><title>{escape(features.sample_names[clip])}: '
            f"{escape(class_names[number])}</title></circle>"
            for clip, (x, y) in zip(members, places[view][members], strict=True)
        )
        groups.append(f'<g data-action="{number}" fill="{class_colour(number, len(class_names))}">{circles}</g>')
    if len(classes) <= _MOST_LABELS:
        names_at = {
            name: label_places(
                np.array([np.median(where[labels == number], axis=0) for number in classes]),
                np.array([_LETTER * len(class_names[number]) for number in classes]),
            )
            for name, where in places.items()
        }
        groups += [
            f'<text data-action="{number}" x="{x:.0f}" y="{y:.0f}">{escape(class_names[number])}</text>'
            for number, (x, y) in zip(classes, names_at[view], strict=True)
        ]
    else:
        names_at = {name: np.empty((0, 2)) for name in places}
    coordinates = {
        name: {"points": _whole(where[order]), "labels": _whole(names_at[name])} for name, where in places.items()
    }
    height = max(where[:, 1].max() for where in places.values()) + _MARGIN
    words = f"{run.name}, {view.replace('_', ' ')}"
    return (
        f'<figure class="embedding"><figcaption>{escape(words)}</figcaption>'
        f'<div class="controls" hidden>{_select("view", {name: name.replace("_", " ") for name in places})}'
        f"{_select('action', {'': 'all actions', **{str(number): class_names[number] for number in classes}})}</div>"
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="t-SNE of the features of {escape(words)}">'
        f"{''.join(groups)}</svg>{page.data(coordinates)}</figure>"
    )


def _select(name: str, options: Mapping[str, str]) -> str:
    """A choice, if there is one."""
    inner = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options.items())
    return f'<label>{name} <select data-control="{name}">{inner}</select></label>' if len(options) > 1 else ""


def _whole(places: np.ndarray) -> list[int]:
    return np.rint(places).astype(int).ravel().tolist()


def label_places(places: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(n, 2) middles of words, moved as little as it takes for none to stand on another or beyond the sides.

    Args:
        places: (n, 2), where they would best stand.
        widths: (n,), of the words.
    """
    moved = places.astype(float)
    moved[:, 0] = moved[:, 0].clip(widths / 2, np.maximum(_WIDTH - widths / 2, widths / 2))
    # Of two at the same height the first goes up.
    order = np.sign(np.subtract.outer(np.arange(len(moved)), np.arange(len(moved))))
    for _round in range(50):
        across, down = np.moveaxis(moved[:, None] - moved[None], -1, 0)
        close = (np.abs(across) < (widths[:, None] + widths) / 2) & (np.abs(down) < _LETTER_HEIGHT) & (order != 0)
        if not close.any():
            break
        push = np.where(close, np.where(down == 0, order, np.sign(down)) * (_LETTER_HEIGHT - np.abs(down)), 0.0)
        moved[:, 1] = np.maximum(moved[:, 1] + 0.4 * push.sum(axis=1), _LETTER_HEIGHT)
    return moved


def class_colour(number: int, num_classes: int) -> str:
    """An action's colour: one of ten, or of more actions a hue of its own, neighbours far apart."""
    if num_classes <= len(_CLASS_COLOURS):
        return _CLASS_COLOURS[number]
    return f"hsl({number * 137.5 % 360:.0f} 62% {(42, 54, 66)[number % 3]}%)"
