"""A `Report` as one picture 1600 pixels wide: each section is drawn as a block, the blocks are stacked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageDraw

from icd_lightning.evaluation.axes import LIGHT
from icd_lightning.evaluation.blocks import BLEED, SMALL, body_block, empty_block
from icd_lightning.evaluation.drawing import (
    Style,
    fill_rounded,
    lines_height,
    rounded_mask,
    text_width,
    wrap,
    write,
    write_lines,
)
from icd_lightning.evaluation.report import Curve, Report, Section

WIDTH, MARGIN = 1600, 64
INNER = WIDTH - 2 * MARGIN
SECTION_GAP = 60
NOTE_WIDTH = 1180  # longer lines are hard to read

TITLE = Style(56, LIGHT["ink"], bold=True)
SUBTITLE = Style(27, LIGHT["muted"])
HEADING = Style(34, LIGHT["ink"], bold=True)
NOTE = Style(23, LIGHT["muted"])
QUIET = Style(22, LIGHT["muted"])


def figure(report: Report) -> Image.Image:
    """Draw the report; the corners are transparent, so that the sheet sits well on a dark page too."""
    blocks = [_header(report)]
    for are_curves, group in groupby(report.sections, key=lambda section: isinstance(section, Curve)):
        sections, per_row = list(group), 2 if are_curves else 1
        blocks += [_row(sections[start : start + per_row]) for start in range(0, len(sections), per_row)]
    if report.facts:
        blocks.append(_facts(report.facts))
    height = sum(block.height for block in blocks) + SECTION_GAP * (len(blocks) - 1) + 2 * MARGIN
    sheet, y = Image.new("RGB", (WIDTH, height), LIGHT["paper"]), MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN - BLEED, y))
        y += block.height + SECTION_GAP
    sheet.putalpha(rounded_mask(sheet.size, 28, scale=2))
    return sheet


def _row(sections: Sequence[Section]) -> Image.Image:
    """Sections side by side: heading and note of each, and the bodies at one height."""
    gap = 64
    width = (INNER - gap * (len(sections) - 1)) // len(sections)
    captions = [
        [*wrap(section.title, HEADING, width), *wrap(section.note, NOTE, min(width, NOTE_WIDTH))]
        for section in sections
    ]
    bodies = [body_block(section, width) for section in sections]
    top = max(map(lines_height, captions)) + 24
    image = empty_block(top + max(body.height for body in bodies), INNER)
    for index, (caption, body) in enumerate(zip(captions, bodies, strict=True)):
        x = index * (width + gap)
        write_lines(image, (x + BLEED, 0), caption)
        image.paste(body, (x, top))
    return image


def _header(report: Report) -> Image.Image:
    lines = [*wrap(report.title, TITLE, INNER), *wrap(report.subtitle, SUBTITLE, NOTE_WIDTH)]
    per_row = -(-len(report.summary) // max(-(-len(report.summary) // 5), 1))  # up to five; six are three and three
    rows = [_tiles(report.summary[i : i + per_row], per_row) for i in range(0, len(report.summary), max(per_row, 1))]
    image = empty_block(lines_height(lines) + (16 if rows else 0) + sum(18 + row.height for row in rows), INNER)
    y = round(write_lines(image, (BLEED, 0), lines)) + 34
    for row in rows:
        image.paste(row, (0, y))
        y += row.height + 18
    return image


def _tiles(summary: Sequence[tuple[str, str]], per_row: int) -> Image.Image:
    gap, inset = 18, 26
    width = (INNER - gap * (per_row - 1)) // per_row
    labels = [wrap(label, QUIET, width - 2 * inset) for _, label in summary]
    image = empty_block(96 + max(lines_height(label) for label in labels) + 24, INNER)
    for index, ((value, _), label) in enumerate(zip(summary, labels, strict=True)):
        x = BLEED + index * (width + gap)
        fill_rounded(image, (x, 0, x + width, image.height), 18, LIGHT["soft"])
        styles = [Style(size, LIGHT["ink"], bold=True) for size in range(52, 17, -2)]
        style = next((style for style in styles if text_width(value, style) <= width - 2 * inset), styles[-1])
        write(image, (x + inset, 74 - style.size), (value, style))
        write_lines(image, (x + inset, 92), label)
    return image


def _facts(facts: dict[str, str]) -> Image.Image:
    """A paragraph that breaks between facts where it can."""
    rows: list[str] = []
    for fact in (f"{name}: {value}" for name, value in facts.items()):
        joined = f"{rows[-1]}\u00a0\u00a0 ·\u00a0\u00a0 {fact}" if rows else fact
        if rows and text_width(joined, SMALL) <= INNER:
            rows[-1] = joined
        else:
            rows.append(fact)
    lines = [line for row in rows for line in wrap(row, SMALL, INNER)]
    image = empty_block(22 + lines_height(lines), INNER)
    ImageDraw.Draw(image).line((BLEED, 0, BLEED + INNER, 0), fill=LIGHT["rule"], width=2)
    write_lines(image, (BLEED, 22), lines)
    return image
