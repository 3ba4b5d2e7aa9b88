"""The parts of the report page, in the order they stand on it: one file each, one line each below.

A section is a function ``render(material)`` from :class:`ikem_fast.report.records.Material` to a list of
:class:`ikem_fast.report.page.Section`, which is empty where the runs hold nothing to show.
"""

from __future__ import annotations

from collections.abc import Callable

from ikem_fast.report.page import Section
from ikem_fast.report.records import Material
from ikem_fast.report.sections import (
    accuracy,
    clips,
    confusion,
    embedding,
    evaluations,
    facts,
    headlines,
    runs,
    training,
)

Render = Callable[[Material], list[Section]]

SECTIONS: tuple[Render, ...] = (
    headlines.render,
    runs.render,
    accuracy.render,
    evaluations.render,
    training.render,
    embedding.render,
    confusion.render,
    clips.render,
    facts.render,
)
