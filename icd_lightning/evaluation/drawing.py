"""Text and rounded shapes on a PIL picture, in a font that comes with Pillow and looks the same on every machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

At = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How letters look: size in pixels, colour, weight."""

    size: int
    color: str
    bold: bool = False

    @property
    def height(self) -> int:
        """Pixels from one line to the next."""
        return round(self.size * 1.36)


Line = tuple[str, Style]


def text_width(text: str, style: Style) -> float:
    return sum(font.getlength(part) for font, part in _runs(text, style.size))


def wrap(text: str, style: Style, width: float) -> list[Line]:
    """Break text into lines no wider than `width`: between words, or inside a word that is wider than a line."""
    lines: list[str] = []
    for paragraph in text.split("\n") if text else []:
        line = ""
        for word in filter(None, paragraph.split(" ")):  # no-break spaces hold
            joined = f"{line} {word}" if line else word
            if text_width(joined, style) <= width:
                line = joined
                continue
            lines += [line] if line else []
            line = ""
            for letter in word:
                if line and text_width(line + letter, style) > width:
                    lines.append(line)
                    line = ""
                line += letter
        lines.append(line)
    return [(line, style) for line in lines]


def lines_height(lines: Sequence[Line]) -> int:
    return sum(style.height for _, style in lines)


def write(image: Image.Image, at: At, line: Line, *, align: float = 0.0) -> None:
    """Write a line whose top is at y; `align` 0, 0.5 and 1 put its left end, its middle or its right end at x."""
    text, style = line
    x, baseline = at[0] - align * text_width(text, style), at[1] + style.size
    for font, part in _runs(text, style.size):
        if style.bold:
            _write_bold(image, (x, baseline), part, style)
        else:
            ImageDraw.Draw(image).text((x, baseline), part, font=font, fill=style.color, anchor="ls")
        x += font.getlength(part)


def _write_bold(image: Image.Image, at: At, text: str, style: Style, *, scale: int = 6) -> None:
    """The font has one weight: bold is its outline made thicker, drawn large so that parts of a pixel count."""
    left, top, pad = int(at[0]), int(at[1]) - 2 * style.size, style.size
    size = (round(text_width(text, style)) + 2 * pad, 3 * style.size)
    mask = Image.new("L", (size[0] * scale, size[1] * scale))
    origin = ((at[0] - left + pad) * scale, (at[1] - top) * scale)
    font = _runs(text[:1], style.size * scale)[0][0]
    weight = max(round(style.size * scale / 60), 1)
    ImageDraw.Draw(mask).text(origin, text, font=font, fill=255, anchor="ls", stroke_width=weight)
    mask = mask.reduce(scale)
    image.paste(style.color, (left - pad, top, left - pad + size[0], top + size[1]), mask)


def write_lines(image: Image.Image, at: At, lines: Sequence[Line], *, align: float = 0.0) -> float:
    """Write lines under one another; return the y below them."""
    y = at[1]
    for line in lines:
        write(image, (at[0], y), line, align=align)
        y += line[1].height
    return y


def rounded_mask(size: tuple[int, int], radius: float, *, scale: int = 4) -> Image.Image:
    """White inside a rounded rectangle, with smooth corners."""
    mask = Image.new("L", (size[0] * scale, size[1] * scale))
    box = (0, 0, mask.width - 1, mask.height - 1)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius * scale, fill=255)
    return mask.reduce(scale)


def fill_rounded(image: Image.Image, box: tuple[float, float, float, float], radius: float, color: str) -> None:
    """Fill a rounded rectangle (left, top, right, bottom)."""
    left, top, right, bottom = (round(edge) for edge in box)
    image.paste(color, (left, top, right, bottom), rounded_mask((right - left, bottom - top), radius))


def stroke(image: Image.Image, runs: Sequence[Sequence[At]], color: str, *, width: float = 3.0, scale: int = 3) -> None:
    """Draw smooth lines through points of the picture; a run of one point is a dot."""
    mask = Image.new("L", (image.width * scale, image.height * scale))
    draw = ImageDraw.Draw(mask)
    radius = width * scale / 2
    for run in runs:
        points = [(x * scale, y * scale) for x, y in run]
        draw.line(points, fill=255, width=round(2 * radius), joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    image.paste(color, (0, 0, *image.size), mask.reduce(scale))


def draw_mark(image: Image.Image, at: At, mark: str, color: str, paper: str, *, radius: int = 8) -> None:
    """Draw a disc, a ring with `paper` in it, or a square around a point."""
    left, top = round(at[0]) - radius, round(at[1]) - radius
    box = (left, top, left + 2 * radius, top + 2 * radius)
    fill_rounded(image, box, 1 if mark == "square" else radius, color)
    if mark == "ring":
        fill_rounded(image, (left + 3, top + 3, box[2] - 3, box[3] - 3), radius - 3, paper)


def _runs(text: str, size: int) -> list[tuple[ImageFont.FreeTypeFont, str]]:
    """Split text where the font changes: Pillow's lacks arrows and Greek, matplotlib's DejaVu has them."""
    return [
        (_fallback_font(size) if missing else _font(size), "".join(letters))
        for missing, letters in groupby(text, key=_is_missing)
    ]


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


@lru_cache(maxsize=64)
def _fallback_font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, round(size * 0.92))


@lru_cache(maxsize=4096)
def _is_missing(letter: str) -> bool:
    if letter.isascii():
        return False
    font = _font(32)
    return bytes(font.getmask(letter)) == bytes(font.getmask("\uffff"))
