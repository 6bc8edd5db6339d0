"""The bodies of a report's sections as pictures: panels, tables and plots, each a block to be stacked on a sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from icd_lightning.evaluation.axes import LIGHT, LIGHT_SERIES, axes, lines
from icd_lightning.evaluation.drawing import (
    Line,
    Style,
    draw_mark,
    fill_rounded,
    lines_height,
    rounded_mask,
    stroke,
    text_width,
    wrap,
    write,
    write_lines,
)
from icd_lightning.evaluation.report import Cell, Curve, Panel, Picture, Section, Table

BLEED = 16  # how far a tint reaches beyond the text on it
MAX_PICTURE, MIN_LABEL, PICTURE_GAP = 256, 300, 14
MIN_TEXT_COLUMN = 260

SMALL = Style(20, LIGHT["muted"])
BODY = Style(22, LIGHT["ink"])
HEAD = Style(22, LIGHT["ink"], bold=True)
OURS = Style(22, LIGHT["accent"], bold=True)


def empty_block(height: float, width: int) -> Image.Image:
    """A sheet whose text stands between x = BLEED and BLEED + width."""
    return Image.new("RGB", (width + 2 * BLEED, round(height)), LIGHT["paper"])


def body_block(section: Section, width: int) -> Image.Image:
    """Draw what stands below a section's heading and note."""
    if isinstance(section, Panel):
        return _panel(section, width)
    return _table(section, width) if isinstance(section, Table) else _plot(section, width)


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
    image = empty_block(top + sum(heights) + PICTURE_GAP * (len(heights) - 1) + PICTURE_GAP // 2, width)
    for first, last in _bands(panel.highlighted):
        margin = PICTURE_GAP // 2
        box = (xs[first] - margin, 0, xs[last] + side + margin, image.height)
        fill_rounded(image, box, 14, LIGHT["tint"])
    for x, head in zip(xs, heads, strict=False):
        write_lines(image, (x, 8), head)
    y = top
    for label, row, height in zip(labels, pictures, heights, strict=True):
        write_lines(image, (BLEED, y + (height - lines_height(label)) / 2), label)
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
    size, widths, gap = _columns(table, width)
    ends = [BLEED + sum(widths[: index + 1]) + gap * index for index in range(len(widths))]
    aligns = [float(table.is_numeric(index)) for index in range(len(widths))]
    xs = [end - (1 - align) * column for end, column, align in zip(ends, widths, aligns, strict=True)]
    heads = [wrap(head, Style(size - 1, LIGHT["muted"]), w) for head, w in zip(table.heads(), widths, strict=True)]
    rows = [
        [
            _table_cell(cell, size, w, ours=number in table.highlight_rows, first=not index)
            for index, (cell, w) in numbered
        ]
        for number, cells in enumerate(table.cells())
        if (numbered := list(enumerate(zip(cells, widths, strict=True))))
    ]
    heights = [max(map(lines_height, row)) + round(size * 0.75) for row in rows]
    head_height, legend = max(map(lines_height, heads)), wrap(table.legend, SMALL, width)
    image = empty_block(head_height + 14 + sum(heights) + (14 if legend else 0) + lines_height(legend), width)
    for x, align, head in zip(xs, aligns, heads, strict=True):
        write_lines(image, (x, head_height - lines_height(head)), head, align=align)
    draw, y, right = ImageDraw.Draw(image), head_height + 12, round(ends[-1])
    draw.line((BLEED, y, right, y), fill=LIGHT["muted"], width=2)
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if number in table.highlight_rows:
            fill_rounded(image, (0, y + 2, right + BLEED, y + height - 1), 10, LIGHT["tint"])
        for x, align, cell in zip(xs, aligns, row, strict=True):
            write_lines(image, (x, y + (height - lines_height(cell)) / 2), cell, align=align)
        y += height
        draw.line((BLEED, y, right, y), fill=LIGHT["rule"], width=1)
    write_lines(image, (BLEED, y + 14), legend)
    return image


def _table_cell(cell: Cell, size: int, width: float, *, ours: bool, first: bool) -> list[Line]:
    named = ours and first  # the name of a row of ours
    return wrap(cell.text, Style(size, LIGHT["accent" if named else "ink"], cell.best or named), width)


def _columns(table: Table, width: int) -> tuple[int, list[float], float]:
    """The largest letters with which the table fits, the columns' widths and their gap; numbers keep to one line."""
    least, most = 30, 120
    for size in range(23, 11, -1):
        widths = _natural_widths(table, Style(size, LIGHT["ink"], bold=True))
        gaps = max(len(widths) - 1, 1)
        excess = sum(widths) - (width - least * (len(widths) - 1))
        if excess <= 0:
            return size, widths, min(least - excess / gaps, most)
        spare = [
            0 if table.is_numeric(index) else max(column - MIN_TEXT_COLUMN, 0) for index, column in enumerate(widths)
        ]
        if sum(spare) >= excess:  # text can wrap
            return size, [w - excess * part / sum(spare) for w, part in zip(widths, spare, strict=True)], least
    scale = 1 - excess / sum(widths)  # too many columns even so: break inside words rather than run off the page
    return size, [w * scale for w in widths], least


def _natural_widths(table: Table, style: Style) -> list[float]:
    """Each column as wide as its longest value; its head may wrap between words."""
    widths = []
    for index, head in enumerate(table.heads()):
        body = max((text_width(row[index].text, style) for row in table.cells()), default=0.0)
        word = max((text_width(word, style) for word in head.split(" ")), default=0.0)
        widths.append(max(body, word, min(text_width(head, style), 8 * style.size)) + 2)
    return widths


# --- curves -----------------------------------------------------------------------------------------------------------


def _plot(curve: Curve, width: int) -> Image.Image:
    x_axis, y_axis = axes(curve)
    left = BLEED + max(text_width(text, SMALL) for _, text in y_axis.ticks) + 14
    top, height, right = 40, 300, BLEED + width - 8
    keys = _key_rows(list(curve.series), width)
    image = empty_block(top + height + 88 + 34 * len(keys), width)
    draw = ImageDraw.Draw(image)
    write(image, (BLEED, 0), (curve.y_label, SMALL))
    for value, text in y_axis.ticks:
        y = top + height * (1 - y_axis.place(value))
        draw.line((left, y, right, y), fill=LIGHT["rule"], width=2)
        write(image, (left - 14, y - 13), (text, SMALL), align=1)
    for value, text in x_axis.ticks:
        write(image, (left + (right - left) * x_axis.place(value), top + height + 10), (text, SMALL), align=0.5)
    write(image, ((left + right) / 2, top + height + 40), (curve.x_label, SMALL), align=0.5)
    for index, runs in enumerate(lines(curve, x_axis, y_axis)):
        color, mark = curve.look(index)
        placed = [[(left + (right - left) * x, top + height * (1 - y)) for x, y in run] for run in runs]
        stroke(image, placed, LIGHT_SERIES[color])
        for point in (point for run in placed for point in run if mark):
            draw_mark(image, point, mark, LIGHT_SERIES[color], LIGHT["paper"])
    y = top + height + 84
    for row in keys:
        for x, index, name in row:
            color, mark = curve.look(index)
            if mark:
                draw_mark(image, (x + 13, y + 14), mark, LIGHT_SERIES[color], LIGHT["paper"])
            else:
                fill_rounded(image, (x, y + 11, x + 26, y + 17), 3, LIGHT_SERIES[color])
            write(image, (x + 36, y), (name, BODY))
        y += 34
    return image


def _key_rows(names: Sequence[str], width: int) -> list[list[tuple[float, int, str]]]:
    """Where the names of the series stand: rows of (x, index, name)."""
    rows: list[list[tuple[float, int, str]]] = [[]]
    x = float(BLEED)
    for index, name in enumerate(names):
        needed = 36 + text_width(name, BODY)
        if rows[-1] and x + needed > BLEED + width:
            rows.append([])
            x = float(BLEED)
        rows[-1].append((x, index, name))
        x += needed + 30
    return rows
