"""A `Report` as one picture 1600 pixels wide: each section is drawn as a block, the blocks are stacked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageDraw

from icd_lightning.evaluation.axes import LIGHT, LIGHT_SERIES, axes, lines
from icd_lightning.evaluation.drawing import (
    Line,
    Style,
    fill_rounded,
    lines_height,
    rounded_mask,
    stroke,
    text_width,
    wrap,
    write,
    write_lines,
)
from icd_lightning.evaluation.report import Curve, Panel, Picture, Report, Section, Table

WIDTH, MARGIN = 1600, 64
INNER = WIDTH - 2 * MARGIN
BLEED = 16  # how far a tint reaches beyond the text on it
SECTION_GAP = 60
NOTE_WIDTH = 1180  # longer lines are hard to read
MAX_PICTURE, MIN_LABEL, PICTURE_GAP = 256, 222, 14
MIN_TEXT_COLUMN = 260

TITLE = Style(56, LIGHT["ink"], bold=True)
SUBTITLE = Style(27, LIGHT["muted"])
HEADING = Style(34, LIGHT["ink"], bold=True)
NOTE = Style(23, LIGHT["muted"])
SMALL = Style(20, LIGHT["muted"])
BODY = Style(22, LIGHT["ink"])
QUIET = Style(22, LIGHT["muted"])
HEAD = Style(22, LIGHT["ink"], bold=True)
OURS = Style(22, LIGHT["accent"], bold=True)


def figure(report: Report) -> Image.Image:
    """Draw the report; the corners are transparent, so that the sheet sits well on a dark page too."""
    blocks = [_header(report)]
    for are_curves, group in groupby(report.sections, key=lambda section: isinstance(section, Curve)):
        sections = list(group)
        if are_curves:
            blocks += [_side_by_side(sections[start : start + 2]) for start in range(0, len(sections), 2)]
        else:
            blocks += [_section(section, INNER) for section in sections]
    if report.facts:
        blocks.append(_facts(report.facts))
    height = sum(block.height for block in blocks) + SECTION_GAP * (len(blocks) - 1) + 2 * MARGIN
    sheet, y = Image.new("RGB", (WIDTH, height), LIGHT["paper"]), MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN - BLEED, y))
        y += block.height + SECTION_GAP
    sheet.putalpha(rounded_mask(sheet.size, 28, scale=2))
    return sheet


def _block(height: float, width: int = INNER) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty block, whose text stands between x = BLEED and BLEED + width."""
    image = Image.new("RGB", (width + 2 * BLEED, round(height)), LIGHT["paper"])
    return image, ImageDraw.Draw(image)


def _section(section: Section, width: int) -> Image.Image:
    """Heading, note and body."""
    body = {Panel: _panel, Table: _table, Curve: _plot}[type(section)](section, width)
    title, note = wrap(section.title, HEADING, width), wrap(section.note, NOTE, min(width, NOTE_WIDTH))
    top = lines_height([*title, *note]) + 24
    image, draw = _block(top + body.height, width)
    y = write_lines(draw, (BLEED, 0), title)
    write_lines(draw, (BLEED, y + 4), note)
    image.paste(body, (0, top))
    return image


def _side_by_side(curves: Sequence[Curve]) -> Image.Image:
    gap = 64
    parts = [_section(curve, (INNER - gap) // 2 if len(curves) == 2 else INNER) for curve in curves]
    image, _ = _block(max(part.height for part in parts))
    for index, part in enumerate(parts):
        image.paste(part, (index * ((INNER - gap) // 2 + gap), 0))
    return image


def _header(report: Report) -> Image.Image:
    lines = [*wrap(report.title, TITLE, INNER), *wrap(report.subtitle, SUBTITLE, NOTE_WIDTH)]
    per_row = -(-len(report.summary) // max(-(-len(report.summary) // 5), 1))  # up to five; six are three and three
    rows = [_tiles(report.summary[i : i + per_row], per_row) for i in range(0, len(report.summary), max(per_row, 1))]
    image, draw = _block(lines_height(lines) + (16 if rows else 0) + sum(18 + row.height for row in rows))
    y = round(write_lines(draw, (BLEED, 0), lines)) + 34
    for row in rows:
        image.paste(row, (0, y))
        y += row.height + 18
    return image


def _tiles(summary: Sequence[tuple[str, str]], per_row: int) -> Image.Image:
    gap, inset = 18, 26
    width = (INNER - gap * (per_row - 1)) // per_row
    labels = [wrap(label, QUIET, width - 2 * inset) for _, label in summary]
    image, draw = _block(96 + max(lines_height(label) for label in labels) + 24)
    for index, ((value, _), label) in enumerate(zip(summary, labels, strict=True)):
        x = BLEED + index * (width + gap)
        fill_rounded(image, (x, 0, x + width, image.height), 18, LIGHT["soft"])
        styles = [Style(size, LIGHT["ink"], bold=True) for size in range(52, 17, -2)]
        style = next((style for style in styles if text_width(value, style) <= width - 2 * inset), styles[-1])
        write(draw, (x + inset, 74 - style.size), (value, style))
        write_lines(draw, (x + inset, 92), label)
    return image


def _facts(facts: dict[str, str]) -> Image.Image:
    """A paragraph that breaks between facts where it can."""
    rows: list[str] = []
    for fact in (f"{name}: {value}" for name, value in facts.items()):
        joined = f"{rows[-1]}  ·  {fact}" if rows else fact
        if rows and text_width(joined, SMALL) <= INNER:
            rows[-1] = joined
        else:
            rows.append(fact)
    lines = [line for row in rows for line in wrap(row, SMALL, INNER)]
    image, draw = _block(22 + lines_height(lines))
    draw.line((BLEED, 0, BLEED + INNER, 0), fill=LIGHT["rule"], width=2)
    write_lines(draw, (BLEED, 22), lines)
    return image


# --- pictures ---------------------------------------------------------------------------------------------------------


def _panel(panel: Panel, width: int) -> Image.Image:
    count = max(len(panel.columns), 1)
    labelled = any(label for label, _ in panel.rows)
    side = min(MAX_PICTURE, (width + PICTURE_GAP - (MIN_LABEL if labelled else 0)) // count - PICTURE_GAP)
    label_width = width + PICTURE_GAP - count * (side + PICTURE_GAP) if labelled else 0
    xs = [BLEED + label_width + index * (side + PICTURE_GAP) for index in range(count)]
    heads = [
        _two_sizes(column, OURS if index in panel.highlighted else HEAD, side)
        for index, column in enumerate(panel.columns)
    ]
    labels = [_two_sizes(label, BODY, label_width - 28) for label, _ in panel.rows]
    pictures = [[p if p is None else _fit(p, side) for p in row] for _, row in panel.rows]
    heights = [
        max([lines_height(label), *(p.height for p in row if p)]) for label, row in zip(labels, pictures, strict=True)
    ]
    head_height = max(map(lines_height, heads), default=0)
    top = head_height + 18
    image, draw = _block(top + sum(heights) + PICTURE_GAP * (len(heights) - 1) + PICTURE_GAP // 2, width)
    for first, last in _bands(panel.highlighted):
        margin = PICTURE_GAP // 2
        box = (xs[first] - margin, 0, xs[last] + side + margin, image.height)
        fill_rounded(image, box, 14, LIGHT["tint"])
    for x, head in zip(xs, heads, strict=False):
        write_lines(draw, (x + side / 2, 8 + head_height - lines_height(head)), head, align=0.5)
    y = top
    for label, row, height in zip(labels, pictures, heights, strict=True):
        write_lines(draw, (BLEED, y + (height - lines_height(label)) / 2), label)
        for x, picture in zip(xs, row, strict=True):
            if picture:
                at = (x + (side - picture.width) // 2, y + (height - picture.height) // 2)
                image.paste(picture, at, rounded_mask(picture.size, 8))
        y += height + PICTURE_GAP
    return image


def _bands(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring columns share one band: (first, last) of each."""
    bands: list[tuple[int, int]] = []
    for index in sorted(set(indices)):
        if bands and bands[-1][1] == index - 1:
            bands[-1] = (bands[-1][0], index)
        else:
            bands.append((index, index))
    return bands


def _two_sizes(text: str, style: Style, width: float) -> list[Line]:
    first, _, rest = text.partition("\n")
    return [*wrap(first, style, width), *wrap(rest, SMALL, width)]


def _fit(picture: Picture, side: int) -> Image.Image:
    """Scale a picture until its longer side is `side`."""
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return image.resize(size, Image.Resampling.LANCZOS)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _table(table: Table, width: int) -> Image.Image:
    texts = [[cell.text for cell in cells] for cells in table.cells()]
    size, widths, gap = _columns(table, texts, width)
    ends = [BLEED + sum(widths[: index + 1]) + gap * index for index in range(len(widths))]
    aligns = [float(table.is_numeric(index)) for index in range(len(widths))]
    xs = [end - (1 - align) * column for end, column, align in zip(ends, widths, aligns, strict=True)]
    heads = [wrap(head, Style(size - 1, LIGHT["muted"]), w) for head, w in zip(table.heads(), widths, strict=True)]
    rows = [_row(table, number, size, widths) for number in range(len(table.rows))]
    heights = [max(map(lines_height, row)) + round(size * 0.75) for row in rows]
    head_height = max(map(lines_height, heads))
    legend = wrap(table.legend, SMALL, width)
    image, draw = _block(head_height + 14 + sum(heights) + (12 if legend else 0) + lines_height(legend), width)
    for x, align, head in zip(xs, aligns, heads, strict=True):
        write_lines(draw, (x, head_height - lines_height(head)), head, align=align)
    y, right = head_height + 12, round(ends[-1])
    draw.line((BLEED, y, right, y), fill=LIGHT["muted"], width=2)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number in table.highlight_rows:
            fill_rounded(image, (0, y + 2, right + BLEED, y + height - 1), 10, LIGHT["tint"])
        for x, align, lines in zip(xs, aligns, row, strict=True):
            write_lines(draw, (x, y + (height - lines_height(lines)) / 2), lines, align=align)
        y += height
        draw.line((BLEED, y, right, y), fill=LIGHT["rule"], width=1)
    write_lines(draw, (BLEED, y + 14), legend)
    return image


def _row(table: Table, number: int, size: int, widths: Sequence[float]) -> list[list[Line]]:
    cells, ours = table.cells()[number], number in table.highlight_rows
    return [
        wrap(
            cell.text,
            Style(size, LIGHT["accent" if ours and not index else "ink"], cell.best or (ours and not index)),
            w,
        )
        for index, (cell, w) in enumerate(zip(cells, widths, strict=True))
    ]


def _columns(table: Table, texts: list[list[str]], width: int) -> tuple[int, list[float], float]:
    """The largest letters with which the table fits, the columns' widths and the gap: numbers in one line, text wraps."""
    least, most = 30, 120
    for size in range(23, 11, -1):
        style = Style(size, LIGHT["ink"])
        widths, is_text = [], []
        for index, head in enumerate(table.heads()):
            body = max((text_width(row[index], style) for row in texts), default=0) + 2
            is_text.append(not table.is_numeric(index))
            longest = max(text_width(word, style) for word in head.split() or [""])
            widths.append(max(body, min(text_width(head, style), max(longest, 8 * size)) + 2))
        free = width - least * (len(widths) - 1)
        excess = sum(widths) - free
        if excess <= 0:
            return size, widths, min(least - excess / max(len(widths) - 1, 1), most)
        wide = [w for w, text in zip(widths, is_text, strict=True) if text and w > MIN_TEXT_COLUMN]
        if sum(w - MIN_TEXT_COLUMN for w in wide) >= excess:
            share = excess / sum(w - MIN_TEXT_COLUMN for w in wide)
            shrunk = [
                w - share * (w - MIN_TEXT_COLUMN) if text and w > MIN_TEXT_COLUMN else w
                for w, text in zip(widths, is_text, strict=True)
            ]
            return size, shrunk, least
    scale = free / sum(widths)  # too many columns even so: break inside words rather than run out of the page
    return size, [w * scale for w in widths], least


# --- curves -----------------------------------------------------------------------------------------------------------


def _plot(curve: Curve, width: int) -> Image.Image:
    x_axis, y_axis = axes(curve)
    left = BLEED + max(text_width(text, SMALL) for _, text in y_axis.ticks) + 14
    keys = _key_rows(list(curve.series), width)
    top, height, right = len(keys) * 34 + 48, 300, BLEED + width - 8
    image, draw = _block(top + height + 74, width)
    for number, row in enumerate(keys):
        for x, index, name in row:
            fill_rounded(image, (x, number * 34 + 11, x + 26, number * 34 + 17), 3, LIGHT_SERIES[index])
            write(draw, (x + 36, number * 34), (name, BODY))
    write(draw, (BLEED, top - 40), (curve.y_label, SMALL))
    for value, text in y_axis.ticks:
        y = top + height * (1 - y_axis.place(value))
        draw.line((left, y, right, y), fill=LIGHT["rule"], width=2)
        write(draw, (left - 14, y - 13), (text, SMALL), align=1)
    for value, text in x_axis.ticks:
        write(draw, (left + (right - left) * x_axis.place(value), top + height + 10), (text, SMALL), align=0.5)
    write(draw, ((left + right) / 2, top + height + 42), (curve.x_label, SMALL), align=0.5)
    for color, runs in zip(LIGHT_SERIES, lines(curve, x_axis, y_axis), strict=False):
        placed = [[(left + (right - left) * x, top + height * (1 - y)) for x, y in run] for run in runs]
        stroke(image, placed, color)
    return image


def _key_rows(names: list[str], width: int) -> list[list[tuple[float, int, str]]]:
    """Where the names of the series stand: rows of (x, index, name)."""
    rows: list[list[tuple[float, int, str]]] = [[]]
    x = float(BLEED)
    for index, name in enumerate(names):
        taken = 36 + text_width(name, BODY) + 32
        if rows[-1] and x + taken - 32 > BLEED + width:
            rows.append([])
            x = float(BLEED)
        rows[-1].append((x, index, name))
        x += taken
    return rows
