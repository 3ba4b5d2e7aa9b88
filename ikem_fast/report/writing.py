"""Writes the report page: reads the runs once, lets every section draw what it finds in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ikem_fast.atomic import atomic_open
from ikem_fast.report import page
from ikem_fast.report.records import Material, ReportError, read_runs
from ikem_fast.report.sections import SECTIONS
from ikem_fast.report.sections.facts import data_words

EMBEDDINGS = ("fused", "modalities")


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path | None = None,
    title: str | None = None,
    phases: Iterable[tuple[str, float]] = (),
    samples: Sequence[str] = (),
    embedding: str | None = "fused",
) -> Path:
    """Writes a page on runs, or a comparison of several: one HTML file with all it shows inside.

    Shown is what the run folders hold: curves from their logs, tables of all evaluations, confusion; and from the
    clips, if they can be read, an embedding of the test clips' features and chosen clips in motion and as pictures.
    Runs of the same kind are laid over each other, with the settings in which they differ; a run and its student stand
    one below the other.

    Args:
        runs: folders of pretraining and distillation runs, in the order they are shown.
        out: the HTML file.
        data: prepared data set; None is each run's own, and what needs it is left out where that is gone.
        title: heading of the page; None names the runs.
        phases: names and seconds of what was done to get here, for the facts at the end.
        samples: names of the clips that are drawn; empty = some lively ones of the test clips.
        embedding: "fused" for all modalities together, "modalities" for each of them too (as many times the seconds),
            or None. The features of up to 2000 test clips are computed anew.

    Returns:
        the path of the page.

    Raises:
        CheckpointError, DataError: a run, or the data set that was asked for, cannot be read.
        ReportError: no run, a damaged file of one, no clip of a name, an unknown embedding, or no folder for ``out``.
    """
    if embedding is not None and embedding not in EMBEDDINGS:
        raise ReportError(f"embedding must be {' or '.join(EMBEDDINGS)} or None, got {embedding!r}")
    material = Material(read_runs(runs), data=data, samples=samples, embedding=embedding, phases=tuple(phases))
    out = Path(out)
    # Found out before seconds are spent on the page.
    if out.is_dir() or not out.parent.is_dir():
        raise ReportError(f"out must be a file in a folder that exists, got {out}")
    names = ", ".join(run.name for run in material.runs)
    if title is None:
        title = f"Run {names}" if len(material.runs) == 1 else f"Runs {names}"
    lead = "; ".join(dict.fromkeys(data_words(clip_set) for clip_set in material.clip_sets()))
    sections = [section for render in SECTIONS for section in render(material)]
    with atomic_open(out, "w") as file:
        file.write(page.page(title, f"{lead}." if lead else "", sections))
    return out
