"""The report page's HTML: a handful of building blocks, all styles inside, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from ikem_fast.evaluation.tables import Table
from ikem_fast.report.drawing import Picture, css_colour, style_of_colours

_NUMBER = re.compile(r"-|-?[\d.e+-]+( ± [\d.e+-]+)?( %| clips/s| h \d+ min| min \d+ s| s)?")


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        heading: its title; empty for blocks that stand without a frame around them.
        blocks: its HTML.
        scripts: names of the files in ``assets`` it needs; each comes once, at the page's end.
    """

    heading: str
    blocks: tuple[str, ...]
    scripts: tuple[str, ...] = ()


def asset(name: str) -> str:
    """The text of a file in ``assets``."""
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    names = [f"section-{number}" for number in range(len(sections))]
    links = [
        f'<a href="#{name}">{escape(section.heading)}</a>'
        for name, section in zip(names, sections, strict=True)
        if section.heading
    ]
    body = []
    for name, section in zip(names, sections, strict=True):
        inner = "\n".join(section.blocks)
        if section.heading:
            inner = f'<section id="{name}">\n<h2>{escape(section.heading)}</h2>\n{inner}\n</section>'
        body.append(inner)
    scripts = dict.fromkeys(script for section in sections for script in section.scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style_of_colours()}\n{asset('page.css')}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>\n{paragraph(lead)}\n"
        f'<nav aria-label="sections">{"".join(links)}</nav>\n'
        + "\n".join(body)
        + "\n</main>\n"
        + "".join(f"<script>\n{asset(name)}</script>\n" for name in scripts)
        + "</body>\n</html>\n"
    )


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def notice(text: str) -> str:
    """A paragraph that says what is missing, or what whoever looks after the run should know."""
    return f'<p class="notice">{escape(text)}</p>'


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Headline figures: (figure, what it is)."""
    inner = (f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in values)
    return f'<div class="cards">{"".join(inner)}</div>'


def picture(value: Picture, description: str) -> str:
    """A picture that shrinks with the window."""
    return (
        f'<img width="{value.width}" height="{value.height}" alt="{escape(description)}" loading="lazy" '
        f'src="{value.address}">'
    )


def wide_picture(value: Picture, description: str) -> str:
    """A picture that shrinks no further than it can be read, to be scrolled in windows that are narrower."""
    return f'<div class="scroll" tabindex="0">{picture(value, description)}</div>'


def panels(values: Iterable[tuple[str, Picture, str]]) -> str:
    """Small figures side by side, as many as fit: (caption, picture, description)."""
    inner = (
        f"<figure><figcaption>{escape(caption)}</figcaption>{picture(drawn, description)}</figure>"
        for caption, drawn, description in values
    )
    return f'<div class="panels">{"".join(inner)}</div>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """What colours stand for: (name, entry of ``COLOURS`` or a CSS colour, CSS border style or "dot")."""
    items = []
    for name, colour, style in entries:
        value = colour if colour.startswith(("#", "hsl")) else css_colour(colour)
        key = f'class="dot" style="background:{value}"' if style == "dot" else f'style="border-top:3px {style} {value}"'
        items.append(f"<li><i {key}></i>{escape(name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def table(value: Table, *, grouped: bool = True, wrapped: bool = False) -> str:
    """A table of results.

    Args:
        value: the table.
        grouped: draw a rule where the first column's text changes.
        wrapped: break long cells into lines.
    """
    shown = value.texts()
    numeric = [all(_NUMBER.fullmatch(texts[column]) for texts in shown) for column in range(len(value.columns))]

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if right else ''}>{escape(text)}</{tag}>"
            for text, right in zip(texts, numeric, strict=True)
        )

    lines = [f"<thead><tr>{cells('th', value.columns)}</tr></thead>\n<tbody>"]
    previous = None
    for texts in shown:
        new_group = grouped and previous is not None and texts[0] != previous
        lines.append(f"<tr{' class=group' if new_group else ''}>{cells('td', texts)}</tr>")
        previous = texts[0]
    return (
        f'<div class="scroll" tabindex="0"><table{" class=wrapped" if wrapped else ""}>\n'
        + "\n".join(lines)
        + "</tbody>\n</table></div>"
    )


def facts(values: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, side by side."""
    lines = (f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in values)
    return '<table class="facts">\n' + "\n".join(lines) + "\n</table>"


def folded(summary: str, *blocks: str) -> str:
    """Blocks that show when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(blocks)}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def data(value: Any) -> str:
    """Numbers and names for a script: JSON that no name in it can break out of."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return f'<script type="application/json">{text.replace("<", chr(92) + "u003c")}</script>'
