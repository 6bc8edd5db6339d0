"""A `Report` as one HTML file: pictures inside it, light and dark, for a phone and a screen reader too."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from itertools import groupby
from string import Template

from PIL import Image

from icd_lightning.evaluation.axes import DARK, DARK_SERIES, LIGHT, LIGHT_SERIES, axes, lines
from icd_lightning.evaluation.report import Curve, Panel, Picture, Report, Section, Table

MAX_SIDE = 384  # pixels of a picture in the page; larger ones would make it heavy, and are shown smaller anyhow

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="subtitle">$subtitle</p>
$summary</header>
<main>
$sections
</main>
$facts</body>
</html>
""")

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem); max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%; }
h1 { margin: 0; font-size: clamp(1.8rem, 4.5vw, 2.7rem); line-height: 1.12; letter-spacing: -0.022em;
  text-wrap: balance; }
h2 { margin: 0; font-size: 1.4rem; line-height: 1.25; letter-spacing: -0.012em; }
.subtitle, .note { margin: 0.5rem 0 0; color: var(--muted); max-width: 46rem; text-wrap: pretty; }
.subtitle { font-size: 1.12rem; }
.legend { margin: 0.6rem 0 0; color: var(--muted); font-size: 0.86rem; }
section { margin-top: 3.2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.8rem;
  margin: 1.8rem 0 0; padding: 0; }
.tiles div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: 0.9rem 1.1rem 1rem;
  border-radius: 0.8rem; background: var(--soft); }
.tiles dd { margin: 0; font-size: 2rem; font-weight: 650; line-height: 1.2; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tiles dt { color: var(--muted); font-size: 0.9rem; line-height: 1.35; }
table { border-collapse: separate; border-spacing: 0; }
th { text-align: left; font-weight: 600; }
small { display: block; color: var(--muted); font-size: 0.8rem; font-weight: 400; line-height: 1.3; }

.panel { width: 100%; margin-top: 1.1rem; table-layout: fixed; }
.panel td, .panel th { padding: 0.3rem; }
.panel thead th { vertical-align: top; padding-bottom: 0.45rem; font-size: 0.92rem; line-height: 1.25; }
.panel tbody th { padding-left: 0; padding-right: 1.1rem; font-size: 0.9rem; font-weight: 400; line-height: 1.4;
  vertical-align: middle; overflow-wrap: anywhere; }
.panel .label { width: 21%; }
.panel img { display: block; width: 100%; max-width: 16rem; height: auto; border-radius: 0.4rem; }
.panel .ours { background: var(--tint); }
.panel thead .ours { color: var(--accent); }
.panel thead .first { border-top-left-radius: 0.8rem; }
.panel thead .last { border-top-right-radius: 0.8rem; }
.panel tbody tr:last-child .first { border-bottom-left-radius: 0.8rem; }
.panel tbody tr:last-child .last { border-bottom-right-radius: 0.8rem; }

.scroll { margin-top: 1.1rem; overflow-x: auto; }
.numbers { width: 100%; font-variant-numeric: tabular-nums; }
.numbers td, .numbers th { padding: 0.55rem 0.9rem; border-bottom: 1px solid var(--rule); }
.numbers thead th { vertical-align: bottom; color: var(--muted); font-size: 0.86rem; line-height: 1.3;
  border-bottom: 1.5px solid var(--muted); }
.numbers tbody th { font-weight: 400; min-width: 11rem; }
.numbers td:not(.number) { min-width: 8.5rem; }
.numbers .number { text-align: right; white-space: nowrap; }
.numbers thead .number { white-space: normal; }
.numbers .ours > * { background: var(--tint); }
.numbers .ours > th { color: var(--accent); font-weight: 600; }
.numbers strong { font-weight: 700; }

.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem; }
.curves svg { display: block; width: 100%; max-width: 40rem; margin-top: 0.6rem; overflow: visible; }
.curves text { fill: var(--muted); font-size: 13px; }
.curves .grid { stroke: var(--rule); }
.curves rect { width: 8px; height: 8px; fill: var(--key); stroke: var(--key); stroke-width: 2; }
.curves .disc, .curves .ring { rx: 4px; }
.curves .ring { fill: var(--paper); }
.curves polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.keys { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.9rem 0 0; padding: 0; list-style: none;
  font-size: 0.9rem; }
.keys li::before { content: ""; display: inline-block; width: 1.1rem; height: 0.2rem; margin-right: 0.45rem;
  border-radius: 0.1rem; background: var(--key); vertical-align: middle; }
.keys .disc::before, .keys .ring::before, .keys .square::before { width: 0.5rem; height: 0.5rem;
  border: 2px solid var(--key); }
.keys .disc::before, .keys .ring::before { border-radius: 50%; }
.keys .ring::before { background: none; }

footer { margin-top: 3.5rem; padding-top: 1.2rem; border-top: 1px solid var(--rule); font-size: 0.88rem; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.4rem; margin: 0; }
footer dt { color: var(--muted); }
footer dd { margin: 0; overflow-wrap: anywhere; }

@media (max-width: 44rem) {
  .panel, .panel tbody, .panel tr { display: block; }
  .panel thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  .panel tbody tr { display: grid; grid-template-columns: repeat(var(--per-line), 1fr); gap: 0.5rem;
    margin-bottom: 1.6rem; }
  .panel tbody th { grid-column: 1 / -1; padding: 0; }
  .panel tbody td, .panel tbody tr:last-child td { padding: 0.3rem; border-radius: 0.6rem; }
  .panel td::after { content: attr(data-head); display: block; margin-top: 0.25rem; color: var(--muted);
    font-size: 0.76rem; line-height: 1.25; white-space: pre-line; }
  .panel td.ours::after { color: var(--accent); font-weight: 600; }
  .panel td.hole { display: none; }
  .numbers td, .numbers th { padding: 0.5rem 0.6rem; }
  footer dl { grid-template-columns: 1fr; gap: 0; }
  footer dd { margin-bottom: 0.6rem; }
}
@media print { section { break-inside: avoid; } }
"""


def page(report: Report) -> str:
    """The whole HTML document."""
    groups = groupby(enumerate(report.sections), key=lambda numbered: isinstance(numbered[1], Curve))
    sections = []
    for are_curves, group in groups:
        parts = "\n".join(_section(section, f"section-{index}") for index, section in group)
        sections.append(f'<div class="curves">\n{parts}\n</div>' if are_curves else parts)
    tiles = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>\n" for value, label in report.summary)
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in report.facts.items())
    return PAGE.substitute(
        title=escape(report.title),
        subtitle=escape(report.subtitle),
        style=_colors() + STYLE,
        summary=f'<dl class="tiles">\n{tiles}</dl>\n' if tiles else "",
        sections="\n".join(sections),
        facts=f'<footer aria-label="How this was made">\n<dl>\n{facts}</dl>\n</footer>\n' if facts else "",
    )


def _colors() -> str:
    def variables(colors: dict[str, str], series: tuple[str, ...]) -> str:
        named = colors | {f"series-{index}": color for index, color in enumerate(series)}
        return " ".join(f"--{name}: {color};" for name, color in named.items())

    return (
        f":root {{ color-scheme: light dark; {variables(LIGHT, LIGHT_SERIES)} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(DARK, DARK_SERIES)} }} }}\n"
    )


def _section(section: Section, name: str) -> str:
    if isinstance(section, Panel):
        body = _panel(section)
    else:
        body = _table(section) if isinstance(section, Table) else _curve(section)
    note = f'<p class="note">{escape(section.note)}</p>\n' if section.note else ""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(section.title)}</h2>\n{note}{body}\n</section>'


# --- pictures ---------------------------------------------------------------------------------------------------------


def _panel(panel: Panel) -> str:
    heads = "".join(
        f'<th scope="col" role="columnheader"{_column_class(panel, index)}>{_two_lines(column)}</th>'
        for index, column in enumerate(panel.columns)
    )
    rows = "\n".join(_panel_row(panel, label, pictures) for label, pictures in panel.rows)
    per_line = 2 if len(panel.columns) in (2, 4) else 3  # on a narrow screen
    # the roles keep it a table where that screen lays it out as a grid
    return (
        f'<table class="panel" role="table" style="--per-line: {per_line}">\n'
        f'<thead role="rowgroup"><tr role="row"><td role="cell" class="label"></td>{heads}</tr></thead>\n'
        f'<tbody role="rowgroup">\n{rows}\n</tbody></table>'
    )


def _panel_row(panel: Panel, label: str, pictures: tuple[Picture | None, ...]) -> str:
    cells = []
    for index, (column, picture) in enumerate(zip(panel.columns, pictures, strict=True)):
        if picture is None:
            cells.append(f'<td role="cell"{_column_class(panel, index, "hole")}></td>')
            continue
        alt = escape(" ".join(f"{column}: {label}".split()))
        kind, head = _column_class(panel, index), escape(column)
        cells.append(f'<td role="cell"{kind} data-head="{head}">{_image(picture, alt)}</td>')
    return f'<tr role="row"><th scope="row" role="rowheader">{_two_lines(label)}</th>{"".join(cells)}</tr>'


def _column_class(panel: Panel, index: int, *others: str) -> str:
    ours = panel.highlighted
    names = [*others]
    if index in ours:
        names.append("ours")
        names += [name for name, neighbour in (("first", index - 1), ("last", index + 1)) if neighbour not in ours]
    return f' class="{" ".join(names)}"' if names else ""


def _image(picture: Picture, alt: str) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{alt}" width="{image.width}" height="{image.height}" src="data:image/png;base64,{data}">'


def _two_lines(text: str) -> str:
    first, *rest = (escape(line) for line in text.split("\n"))
    return first + "".join(f"<small>{line}</small>" for line in rest)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    classes = [' class="number"' if table.is_numeric(index) else "" for index in range(len(table.header))]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(head)}</th>' for kind, head in zip(classes, table.heads(), strict=True)
    )
    rows = []
    for number, cells in enumerate(table.cells()):
        texts = [f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text) for cell in cells]
        ours = ' class="ours"' if number in table.highlight_rows else ""
        values = "".join(f"<td{kind}>{text}</td>" for kind, text in zip(classes[1:], texts[1:], strict=True))
        rows.append(f'<tr{ours}><th scope="row"{classes[0]}>{texts[0]}</th>{values}</tr>')
    body = "\n".join(rows)
    legend = f'\n<p class="legend">{escape(table.legend)}</p>' if table.legend else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.title)}">\n<table class="numbers">'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table>\n</div>{legend}"
    )


# --- curves -----------------------------------------------------------------------------------------------------------


def _curve(curve: Curve) -> str:
    left, top, width, height = 58, 26, 452, 240
    x_axis, y_axis = axes(curve)
    parts = [f'<text x="0" y="12">{escape(curve.y_label)}</text>']
    for value, text in y_axis.ticks:
        y = top + height * (1 - y_axis.place(value))
        parts.append(f'<line class="grid" x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 10}" y="{y + 4.5:.1f}" text-anchor="end">{text}</text>')
    for value, text in x_axis.ticks:
        x = left + width * x_axis.place(value)
        parts.append(f'<text x="{x:.1f}" y="{top + height + 20}" text-anchor="middle">{text}</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 42}" text-anchor="middle">{escape(curve.x_label)}</text>'
    )
    for index, runs in enumerate(lines(curve, x_axis, y_axis)):
        color, mark = curve.look(index)
        for run in runs:
            placed = [(left + width * x, top + height * (1 - y)) for x, y in run]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline style="stroke: var(--series-{color})" points="{points}"/>')
            parts += [
                f'<rect class="{mark}" style="--key: var(--series-{color})" x="{x - 4:.1f}" y="{y - 4:.1f}"/>'
                for x, y in placed
                if mark
            ]
    keys = "".join(
        f'<li class="{mark}" style="--key: var(--series-{color})">{escape(name)}</li>'
        for name, (color, mark) in zip(curve.series, map(curve.look, range(len(curve.series))), strict=True)
    )
    described = escape(f"{curve.title}: {curve.y_label} over {curve.x_label} for {', '.join(curve.series)}")
    picture = "\n".join(parts)
    return (
        f'<ul class="keys">{keys}</ul>\n<svg viewBox="0 0 520 312" role="img" aria-label="{described}">\n'
        f"{picture}\n</svg>"
    )
