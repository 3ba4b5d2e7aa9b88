"""The report page's HTML: a handful of building blocks, all styles inside, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from ikem_fast.evaluation.tables import Table
from ikem_fast.report.figures import Png

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --line: #e4e7eb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7fa; color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; }
h2 { font-size: 19px; margin: 0 0 4px; }
h3 { font-size: 15px; margin: 20px 0 4px; color: var(--soft); }
p { margin: 4px 0 12px; color: var(--soft); max-width: 78ch; }
section { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px; margin-top: 20px; }
img { max-width: 100%; height: auto; display: block; margin: 10px auto 0; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px; flex: 1 1 180px; }
.card b { display: block; font-size: 26px; line-height: 1.2; color: var(--accent); }
.card span { color: var(--soft); font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
th, td { padding: 4px 18px 4px 0; vertical-align: top; white-space: nowrap; }
td { border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; }
tr.group td { border-top: 2px solid #cbd2d9; }
table.facts td { white-space: normal; }
table.facts td:first-child { color: var(--soft); white-space: nowrap; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); }
pre { background: #f5f7fa; border: 1px solid var(--line); border-radius: 6px; padding: 12px; overflow-x: auto;
  font-size: 12.5px; line-height: 1.45; }
"""


def page(title: str, lead: str, blocks: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n" + "\n".join(blocks) + "\n</main>\n</body>\n</html>\n"
    )


def section(heading: str, *blocks: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(blocks) + "\n</section>"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Headline figures: (figure, what it is)."""
    inner = (f'<div class="card"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for value, what in values)
    return f'<div class="cards">{"".join(inner)}</div>'


def picture(png: Png, description: str) -> str:
    return f'<img width="{png.width}" alt="{escape(description)}" src="data:image/png;base64,{png.base64}">'


def table(value: Table) -> str:
    """A table of results; a rule where the first column's text changes."""
    numeric = [all(not isinstance(row[column], str) for row in value.rows) for column in range(len(value.columns))]

    def cells(tag: str, texts: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if right else ''}>{escape(text)}</{tag}>"
            for text, right in zip(texts, numeric, strict=True)
        )

    lines = [f"<tr>{cells('th', value.columns)}</tr>"]
    previous = None
    for texts in value.texts():
        new_group = previous is not None and texts[0] != previous
        lines.append(f"<tr{' class=group' if new_group else ''}>{cells('td', texts)}</tr>")
        previous = texts[0]
    return '<div class="scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def facts(values: Sequence[tuple[str, str]]) -> str:
    """Names and what they are, side by side."""
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in values)
    return '<table class="facts">\n' + "\n".join(lines) + "\n</table>"


def folded(summary: str, text: str) -> str:
    """Text that shows when asked for."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
