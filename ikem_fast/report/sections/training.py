"""How training went: losses, kNN accuracy along the way, learning rate and throughput.

One run of a kind is drawn with a line per modality, several are laid over each other with a colour per run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ikem_fast.report import page
from ikem_fast.report.drawing import Line, Picture, Series, colour_name, draw_svg, line_panel, series_style
from ikem_fast.report.page import Section
from ikem_fast.report.records import Curves, Material, RunRecord, clock
from ikem_fast.report.sections.runs import KIND_TITLES

_LOSS_TITLES = {
    "single": "contrast within a modality",
    "context": "context exchange",
    "exchange": "implicit exchange",
    "distill": "relational distillation",
}
_FULLEST_FIRST = {"all": 0, "joint+motion+bone": 1}
Panel = tuple[str, Picture, str]
"""Caption, picture and description of a small figure."""


def render(material: Material) -> list[Section]:
    sections = []
    for kind, title in KIND_TITLES.items():
        runs = material.runs_of(kind)
        if len(runs) == 1:
            sections.append(Section(title, tuple(_one_run(runs[0], material.chance()))))
        elif runs:
            sections.append(Section(f"{title}: {len(runs)} runs", tuple(_several_runs(runs, material.chance()))))
    return sections


# ---- one run ---------------------------------------------------------------------------------------------------------


def _one_run(run: RunRecord, chance: float | None) -> list[str]:
    curves = run.curves
    state = run.state()
    words = f"{state[0].upper()}{state[1:]}; {run.step} steps, {clock(run.seconds)} of training."
    blocks = [page.paragraph(words), *_notes(curves)]
    panels = _panels_by_kind(curves.losses, "loss", "losses by step")
    if curves.knn:
        lines = [Line(_percent(series), colour_name(view, n)) for n, (view, series) in enumerate(curves.knn.items())]
        figure = line_panel(lines, x_label="epoch", y_label="%", level=_level(chance), from_zero=True)
        panels.append(("kNN accuracy, k = 1", draw_svg(figure), f"{run.name}: kNN accuracy of every view by epoch"))
    panels += _pace_panels([_Styled(run.name, "accent", "solid", curves)])
    if panels:
        blocks += [_legend_of_views((*curves.losses, *curves.knn)), page.panels(panels)]
    if curves.contrast:
        percents = {name: _percent(series) for name, series in curves.contrast.items()}
        blocks.append(
            page.folded(
                "Accuracy of the contrast (%): how often the positive is more similar than every key of the queue",
                _legend_of_views(percents),
                page.panels(_panels_by_kind(percents, "accuracy", "accuracy of the contrast by step")),
            )
        )
    return blocks


def _panels_by_kind(named: Mapping[str, Series], what: str, description: str) -> list[Panel]:
    """A panel for each kind of loss, with a line for each modality."""
    views = list(dict.fromkeys(_view(name) for name in named))
    panels = []
    for kind in _kinds(named):
        lines = [
            Line(series, colour_name(_view(name), views.index(_view(name))), smoothed=True)
            for name, series in named.items()
            if _kind(name) == kind
        ]
        title = _LOSS_TITLES.get(kind, kind)
        panels.append((f"{what}: {title}", draw_svg(line_panel(lines, x_label="step")), f"{title}: {description}"))
    return panels


def _legend_of_views(names: Iterable[str]) -> str:
    views = dict.fromkeys(_view(name) for name in names)
    return page.legend((view.replace("_", " "), colour_name(view, n), "solid") for n, view in enumerate(views))


# ---- several runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Styled:
    """A run's curves and how its lines are drawn."""

    name: str
    colour: str
    dashes: str
    curves: Curves

    def line(self, series: Series, **options: bool) -> Line:
        return Line(series, self.colour, self.dashes, **options)


def _several_runs(runs: list[RunRecord], chance: float | None) -> list[str]:
    styled = [_Styled(run.name, *series_style(position), run.curves) for position, run in enumerate(runs)]
    legend = page.legend((run.name, run.colour, run.dashes) for run in styled)
    blocks = [note for run in styled for note in _notes(run.curves, f"{run.name}: ")]
    names = list(dict.fromkeys(name for run in styled for name in run.curves.losses))
    views = list(dict.fromkeys(view for run in styled for view in run.curves.knn))
    panels = []
    for kind in _kinds(names):
        means = [(run, _mean_of_kind(run.curves.losses, kind)) for run in styled]
        lines = [run.line(series, smoothed=True) for run, series in means if series is not None]
        title = f"loss: {_LOSS_TITLES.get(kind, kind)}"
        panels.append((title, draw_svg(line_panel(lines, x_label="step")), f"{title}, mean over modalities, by step"))
    panels += _pace_panels(styled)
    if panels:
        blocks += [page.paragraph("Losses are means over the modalities."), legend, page.panels(panels)]
    if views:
        views.sort(key=lambda view: _FULLEST_FIRST.get(view, len(_FULLEST_FIRST)))
        shown = _overlaid(styled, views, "knn", level=_level(chance))
        blocks += [page.heading("kNN accuracy along the way, k = 1 (%)"), legend, page.panels(shown)]
    if names:
        shown = page.panels(_overlaid(styled, names, "losses"))
        blocks.append(page.folded("losses of every modality", legend, shown))
    return blocks


def _overlaid(
    styled: Sequence[_Styled], names: Iterable[str], attribute: str, level: tuple[float, str] | None = None
) -> list[Panel]:
    """A panel per name of a loss or a view, with a line for each run that has it."""
    panels = []
    of_knn = attribute == "knn"
    x_label = "epoch" if of_knn else "step"
    for name in names:
        lines = []
        for run in styled:
            series = getattr(run.curves, attribute).get(name)
            if series is not None:
                lines.append(run.line(_percent(series) if of_knn else series, smoothed=not of_knn))
        caption = name.replace("_", " ").replace("/", ": ")
        panel = line_panel(lines, x_label=x_label, level=level, from_zero=of_knn)
        panels.append((caption, draw_svg(panel), f"{caption}, all runs by {x_label}"))
    return panels


def _mean_of_kind(losses: Mapping[str, Series], kind: str) -> Series | None:
    """The mean over the modalities of one kind of loss; a log's lines name all of them or none."""
    members = [series for name, series in losses.items() if _kind(name) == kind]
    if not members:
        return None
    shortest = min(len(values) for _steps, values in members)
    return members[0][0][:shortest], np.mean([values[:shortest] for _steps, values in members], axis=0)


# ---- both ------------------------------------------------------------------------------------------------------------


def _pace_panels(styled: Sequence[_Styled]) -> list[Panel]:
    rates = [run.line(run.curves.learning_rate, steps=True) for run in styled if len(run.curves.learning_rate[0])]
    speeds = [run.line(run.curves.throughput, smoothed=True) for run in styled if len(run.curves.throughput[0])]
    if not speeds:
        return []
    only = styled[0].curves if len(styled) == 1 else None
    marks = {only.stage_2: "stage 2"} if only is not None and only.stage_2 else {}
    rate = line_panel(rates, x_label="step", marks=marks, from_zero=True)
    speed = line_panel(speeds, x_label="step", marks=marks, from_zero=True)
    return [
        ("learning rate", draw_svg(rate), "learning rate by step"),
        ("throughput, clips/s", draw_svg(speed), "throughput by step"),
    ]


def _notes(curves: Curves, prefix: str = "") -> list[str]:
    return [page.notice(f"{prefix}{text[:1].upper()}{text[1:]}.") for text in curves.notes]


def _kind(name: str) -> str:
    return name.split("/")[0]


def _view(name: str) -> str:
    return name.split("/", 1)[-1]


def _kinds(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(_kind(name) for name in names))


def _percent(series: Series) -> Series:
    return series[0], 100 * series[1]


def _level(chance: float | None) -> tuple[float, str] | None:
    return None if chance is None else (100 * chance, "chance")
