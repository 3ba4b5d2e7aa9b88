"""Above the sections: what is missing, and the headline figures of one run or of one with its student."""

from __future__ import annotations

from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material

_MOST_CARDS = 6


def render(material: Material) -> list[Section]:
    blocks = [
        page.notice(f"Left out is what needs the clips, which cannot be read: {error}")
        for error in material.data_problems()
    ]
    linear = {name: entry for name, entry in material.entries("linear").items() if entry["rows"]}
    if linear and len(linear) < _MOST_CARDS:
        blocks.append(page.cards(_cards(material, linear)))
    return [Section("", tuple(blocks))] if blocks else []


def _cards(material: Material, linear: dict) -> list[tuple[str, str]]:
    values = []
    for name, entry in linear.items():
        row = entry["rows"][-1]
        what = row["name"] if len(row["modalities"]) == 1 else f"{len(row['modalities'])} modalities"
        reported = f", {entry['reported']}" if entry.get("reported") else ""
        values.append((f"{100 * row['top1']:.1f} %", f"{name}, {what}: linear top-1{reported}"))
    chance = material.chance()
    if chance is not None:
        values.append((f"{100 * chance:.1f} %", "always guessing the commonest action"))
    return values
