"""A report as one picture 1600 pixels wide, by matplotlib: text, pictures and tables on a canvas of pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from itertools import groupby

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray
from PIL import Image

from icd_lightning.evaluation.report import Bars, Curve, Panel, Picture, Report, Section, Table
from icd_lightning.evaluation.report.figures import (
    COLORS,
    FAMILY,
    PIXELS,
    REPORTED,
    SERIES,
    Font,
    curve_pixels,
    text_width,
)

WIDTH, MARGIN = 1600, 64
INNER = WIDTH - 2 * MARGIN
BLEED = 16  # how far a tint reaches beyond the text on it
SECTION_GAP = 60
NOTE_WIDTH = 1180  # longer lines are hard to read
MAX_PICTURE, MIN_LABEL, PICTURE_GAP = 256, 300, 14

Line = tuple[str, Font]

TITLE, SUBTITLE = Font(50, weight="bold"), Font(25, "muted")
VALUE, HEAD = Font(46, weight="bold"), Font(20, weight="bold")
HEADING, NOTE = Font(31, weight="bold"), Font(21, "muted")
BODY, QUIET, SMALL = Font(20), Font(20, "muted"), Font(18, "muted")


def wrap(text: str, font: Font, width: float) -> list[Line]:
    """Break text into lines no wider than `width`: between words, or inside a word that is wider than a line."""
    lines: list[str] = []
    for paragraph in text.split("\n") if text else []:
        lines.append("")
        for word in filter(None, paragraph.split(" ")):  # no-break spaces hold
            space = " " if lines[-1] else ""
            if text_width(lines[-1] + space + word, font) <= width:
                lines[-1] += space + word
                continue
            if lines[-1]:
                lines.append("")
            for letter in word:
                if lines[-1] and text_width(lines[-1] + letter, font) > width:
                    lines.append("")
                lines[-1] += letter
    return [(line, font) for line in lines]


def shrunk(font: Font, texts: Iterable[str], width: float) -> Font:
    """The font, or the largest below it in which none of the texts is wider than `width`."""
    widest = max((text_width(text, font) for text in texts), default=0)
    return font if widest <= width else font._replace(size=max(int(font.size * width / widest), 11))


def lines_height(lines: Sequence[Line]) -> int:
    return sum(round(1.4 * font.size) for _, font in lines)


class Canvas:
    """A figure whose coordinates are pixels, y downwards, as high as `end` says."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.figure = Figure(dpi=PIXELS, facecolor="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(1, 0), autoscale_on=False)
        self.axes.axis("off")

    def write(self, x: float, y: float, lines: Sequence[Line]) -> float:
        """Write lines under one another, the first below y; return the y below them."""
        for text, font in lines:
            style = {"fontsize": font.size, "color": COLORS[font.color], "weight": font.weight, "ha": font.align}
            self.axes.text(x, y + font.size, text, family=FAMILY, parse_math=False, **style)
            y += round(1.4 * font.size)
        return y

    def box(self, box: tuple[float, float, float, float], color: str, radius: float, *, zorder: float = -1) -> None:
        """Fill a rounded rectangle (left, top, right, bottom)."""
        self.axes.add_patch(_rounded(box, radius, facecolor=COLORS.get(color, color), zorder=zorder))

    def rule(self, x: float, y: float, width: float, color: str = "rule", thickness: float = 2) -> None:
        self.axes.hlines(y, x, x + width, color=COLORS[color], linewidth=thickness, capstyle="butt")

    def picture(self, pixels: NDArray[np.uint8], x: float, y: float, size: tuple[int, int], radius: float = 0) -> None:
        """Draw pixels (H, W, 3 or 4), scaled to a size (width, height)."""
        left, top, right, bottom = round(x), round(y), round(x) + size[0], round(y) + size[1]
        edges = (left, right, bottom, top)
        image = self.axes.imshow(pixels, extent=edges, aspect="auto", interpolation="lanczos")
        if radius:
            image.set_clip_path(_rounded((left, top, right, bottom), radius, transform=self.axes.transData))

    def end(self, height: float, *, radius: float = 0) -> Canvas:
        """Cut it off at this height, on paper with corners of this radius."""
        height = round(height)
        self.box((0, 0, self.width, height), "paper", radius, zorder=-2)
        self.figure.set_size_inches(self.width / PIXELS, height / PIXELS)
        self.axes.set_ylim(height, 0)
        return self

    def png(self, *, scale: float = 1) -> bytes:
        """The picture as a file; what is not drawn upon is transparent."""
        buffer = BytesIO()
        with rc_context(REPORTED):
            self.figure.savefig(buffer, format="png", dpi=scale * PIXELS, metadata={"Software": None})
        return buffer.getvalue()

    def pixels(self, *, scale: float = 1) -> Picture:
        """The picture as uint8 (H, W, 3)."""
        return np.asarray(Image.open(BytesIO(self.png(scale=scale))).convert("RGB"))

    def _repr_png_(self) -> bytes:
        return self.png()


def _rounded(box: tuple[float, float, float, float], radius: float, **options) -> FancyBboxPatch:
    left, top, right, bottom = box
    style = f"round,pad=0,rounding_size={radius}" if radius else "square,pad=0"
    return FancyBboxPatch((left, top), right - left, bottom - top, boxstyle=style, linewidth=0, **options)


def draw_report(report: Report) -> Canvas:
    """Draw the report; the corners are transparent, so that the sheet sits well on a dark page too."""
    canvas = Canvas(WIDTH)
    head = [*wrap(report.title, TITLE, INNER), *wrap(report.subtitle, SUBTITLE, NOTE_WIDTH)]
    y = canvas.write(MARGIN, MARGIN, head)
    if report.summary:
        y = _tiles(canvas, report.summary, y + 20)
    for are_curves, group in groupby(report.sections, key=lambda section: isinstance(section, Curve)):
        sections, per_row = list(group), 2 if are_curves else 1
        for start in range(0, len(sections), per_row):
            y = _side_by_side(canvas, sections[start : start + per_row], y + SECTION_GAP)
    if report.facts:  # a paragraph that breaks between facts where it can
        facts = [f"{name}: {value}".replace(" ", "\u00a0") for name, value in report.facts.items()]
        canvas.rule(MARGIN, y + SECTION_GAP, INNER)
        lines = wrap(" \u00a0·\u00a0\u00a0 ".join(facts), SMALL, INNER)
        y = canvas.write(MARGIN, y + SECTION_GAP + 22, lines)
    return canvas.end(y + MARGIN, radius=28)


def draw_body(section: Section, *, width: int = INNER) -> Canvas:
    """Draw what stands below a section's heading and note by itself, on paper."""
    canvas = Canvas(width + 2 * BLEED)
    return canvas.end(_body(canvas, section, BLEED, 0, width))


def _body(canvas: Canvas, section: Section, x: float, y: float, width: int) -> float:
    if isinstance(section, Panel):
        return _panel(canvas, section, x, y, width)
    if isinstance(section, Table):
        return _table(canvas, section, x, y, width)
    if isinstance(section, Bars):
        return _bars(canvas, section, x, y, width)
    pixels = curve_pixels(section, width)
    canvas.picture(pixels, x, y, (pixels.shape[1], pixels.shape[0]))
    return y + pixels.shape[0]


def _side_by_side(canvas: Canvas, sections: Sequence[Section], y: float) -> float:
    """Heading and note of each, and the bodies at one height."""
    gap = 64
    width = (INNER - gap * (len(sections) - 1)) // len(sections)
    lefts = [MARGIN + index * (width + gap) for index in range(len(sections))]
    tops = []
    for x, section in zip(lefts, sections, strict=True):
        caption = [*wrap(section.title, HEADING, width), *wrap(section.note, NOTE, min(width, NOTE_WIDTH))]
        tops.append(canvas.write(x, y, caption) + 24)
    return max(_body(canvas, section, x, max(tops), width) for x, section in zip(lefts, sections, strict=True))


def _tiles(canvas: Canvas, summary: Sequence[tuple[str, str]], y: float) -> float:
    gap, inset = 18, 26
    width = (INNER - gap * (len(summary) - 1)) / len(summary)
    labels = [wrap(label, QUIET, width - 2 * inset) for _, label in summary]
    bottom = y + 96 + max(map(lines_height, labels)) + 24
    for index, ((value, _), label) in enumerate(zip(summary, labels, strict=True)):
        x = MARGIN + index * (width + gap)
        canvas.box((x, y, x + width, bottom), "soft", 18)
        font = shrunk(VALUE, [value], width - 2 * inset)
        canvas.write(x + inset, y + 72 - font.size, [(value, font)])
        canvas.write(x + inset, y + 92, label)
    return bottom


def _panel(canvas: Canvas, panel: Panel, x: float, y: float, width: int) -> float:
    count, labelled = len(panel.columns), any(label for label, _ in panel.rows)
    side = min(MAX_PICTURE, (width + PICTURE_GAP - MIN_LABEL * labelled) // count - PICTURE_GAP)
    label_width = (width + PICTURE_GAP - count * (side + PICTURE_GAP)) * labelled
    lefts = [x, *(x + label_width + index * (side + PICTURE_GAP) for index in range(count))]
    head_font = shrunk(HEAD, (word for column in panel.columns for word in column.partition("\n")[0].split()), side)
    colors = ["accent" if index in panel.highlight else "ink" for index in range(count)]
    heads = [
        _two_sizes(column, head_font._replace(color=color), side)
        for column, color in zip(panel.columns, colors, strict=True)
    ]
    bottom = _row(canvas, y + 8, lefts, [[], *heads], down=0) + 10
    for label, pictures in panel.rows:
        cells = [_two_sizes(label, BODY, label_width - 28), *pictures]
        bottom = _row(canvas, bottom, lefts, cells, side=side) + PICTURE_GAP
    for first in panel.highlight:  # neighbours share a band
        last, margin = first + (first + 1 in panel.highlight), PICTURE_GAP // 2
        canvas.box((lefts[first + 1] - margin, y, lefts[last + 1] + side + margin, bottom - margin), "tint", 14)
    return bottom - PICTURE_GAP // 2


def _two_sizes(text: str, font: Font, width: float) -> list[Line]:
    first, _, rest = text.partition("\n")
    return [*wrap(first, font, width), *wrap(rest, SMALL._replace(size=min(SMALL.size, font.size)), width)]


def _row(
    canvas: Canvas,
    y: float,
    places: Sequence[float],
    cells: Sequence[Sequence[Line] | Picture | None],
    *,
    side: int = 0,
    down: float = 0.5,
) -> float:
    """Draw a row of cells, lines or a picture with a longer side of `side`; return the y below.

    Cells that are lower than the row stand `down` in it: 0 is at its top, 1 at its bottom.
    """
    sizes = []
    for cell in cells:
        if isinstance(cell, np.ndarray):
            sizes.append([max(round(length * side / max(cell.shape[:2])), 1) for length in cell.shape[:2]])
        else:
            sizes.append([lines_height(cell or []), 0])
    tallest = max(height for height, _ in sizes)
    for x, cell, (height, width) in zip(places, cells, sizes, strict=True):
        top = y + (tallest - height) * down
        if isinstance(cell, np.ndarray):
            canvas.picture(cell, x + (side - width) // 2, top, (width, height), radius=8)
        else:
            canvas.write(x, top, cell or [])
    return y + tallest


def _table(canvas: Canvas, table: Table, x: float, y: float, width: int) -> float:
    size, widths, gap = _columns(table, width)
    aligns = ["right" if table.is_numeric(index) else "left" for index in range(len(widths))]
    lefts = x + np.cumsum([0, *(column + gap for column in widths[:-1])])
    places = lefts + np.array(widths) * [align == "right" for align in aligns]
    fonts = [Font(size, "muted", align=align) for align in aligns]
    heads = [wrap(head, font, column) for head, font, column in zip(table.heads(), fonts, widths, strict=True)]
    y = _row(canvas, y, places, heads, down=1) + 12
    canvas.rule(x, y, width, "muted")
    for number, cells in enumerate(table.cells()):
        ours, pad, top = number in table.highlight_rows, round(0.4 * size), y
        fonts = [Font(size, "ink", "bold" if c.best else "normal", a) for c, a in zip(cells, aligns, strict=True)]
        fonts[0] = Font(size, "accent", "bold", aligns[0]) if ours else fonts[0]
        lines = [wrap(cell.text, font, column) for cell, font, column in zip(cells, fonts, widths, strict=True)]
        y = _row(canvas, y + pad, places, lines) + pad
        if ours:
            canvas.box((x - BLEED, top + 1, x + width + BLEED, y), "tint", 10)
        canvas.rule(x, y, width, thickness=1)
    return canvas.write(x, y + 14, wrap(table.legend, SMALL, width)) + 4


def _columns(table: Table, width: int) -> tuple[int, list[float], float]:
    """The largest letters with which the table fits, the columns' widths and their gap."""
    widths, gaps = [], max(len(table.header) - 1, 1)
    for head, *texts in zip(table.heads(), *([cell.text for cell in row] for row in table.cells()), strict=True):
        longest = max(text_width(text, HEAD) for text in (*head.split(" "), *texts))  # the head wraps between words
        widths.append(min(max(longest, min(text_width(head, HEAD), 8 * HEAD.size)), 18 * HEAD.size) + 2)
    share = min((width - 30 * gaps) / sum(widths), 1)
    size = max(int(BODY.size * share), 11)  # too many columns even so: break inside words, stay on the sheet
    widths = [column * min(share, size / BODY.size) for column in widths]
    return size, widths, min((width - sum(widths)) / gaps, 120)


BAR, BAR_GAP = 46, 16
PART_COLORS = (("accent", "paper"), ("rule", "ink"), (SERIES[1], "paper"))
"""Of the parts of a bar, and of the letters on them."""


def _bars(canvas: Canvas, bars: Bars, x: float, y: float, width: int) -> float:
    left = x
    for part, (color, _) in zip(bars.parts, PART_COLORS, strict=True):
        canvas.box((left, y + 2, left + 20, y + 22), color, 4)
        canvas.write(left + 30, y, [(part, BODY)])
        left += 30 + text_width(part, BODY) + 36
    y += 44
    for label, shares in bars.rows:
        lines = _two_sizes(label, BODY, MIN_LABEL - 28)
        height, left = max(BAR, lines_height(lines)), x + MIN_LABEL
        canvas.write(x, y + (height - lines_height(lines)) / 2, lines)
        for share, (color, ink) in zip(shares, PART_COLORS, strict=True):
            right, top = left + share * (width - MIN_LABEL), y + (height - BAR) / 2
            canvas.box((left, top, right, top + BAR), color, 0)
            canvas.write((left + right) / 2, top + 9, [(bars.text(share), Font(20, ink, align="center"))])
            left = right
        y += height + BAR_GAP
    return y - BAR_GAP
