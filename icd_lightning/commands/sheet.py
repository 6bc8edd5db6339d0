"""A contact sheet: one picture edited with many settings, each with its label."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from PIL import Image

from icd_lightning.commands.edits import Edit
from icd_lightning.data.images import read_picture, resize_and_crop
from icd_lightning.evaluation.drawing import Style, lines_height, wrap, write_lines

SMALLEST = 192  # pixels of a cell's side; smaller pictures are enlarged, so that labels fit
GAP = 12
TITLE, LABEL = Style(16, "#202020", bold=True), Style(14, "#404040")


def contact_sheet(edit: Edit, grid: Mapping[str, Sequence[float]], cells: Sequence[Image.Image]) -> Image.Image:
    """Draw the cells, the grid's first key varying fastest: its values are the columns, those of all others the rows.

    Above them stand the prompts; the first column is the picture that was edited.
    """
    columns_key, *row_keys = grid
    columns = [_label(columns_key, value) for value in grid[columns_key]]
    rows = [
        "\n".join(_label(key, value) for key, value in zip(row_keys[::-1], values, strict=True))
        for values in itertools.product(*(grid[key] for key in row_keys[::-1]))
    ]
    height, width = cells[0].height, cells[0].width
    scale = max(1, round(SMALLEST / min(height, width)))
    size = (width * scale, height * scale)
    original, _ = resize_and_crop(read_picture(edit.image), height, width)
    heads = [wrap(text, LABEL, size[0]) for text in (edit.image.name, *columns)]
    title_width = (len(heads)) * (size[0] + GAP)
    title = wrap(edit.target, TITLE, title_width) + wrap(f"was: {edit.source}", LABEL, title_width)
    sides = [wrap(text, LABEL, 150) for text in rows]
    left = GAP if not row_keys else 150 + 2 * GAP
    top = GAP + lines_height(title) + GAP + max(map(lines_height, heads)) + GAP // 2
    sheet = Image.new("RGB", (left + len(heads) * (size[0] + GAP), top + len(rows) * (size[1] + GAP)), "white")
    write_lines(sheet, (left, GAP), title)
    head_top = top - GAP // 2 - max(map(lines_height, heads))
    for column, head in enumerate(heads):
        write_lines(sheet, (left + column * (size[0] + GAP), head_top), head)
    for row, side in enumerate(sides):
        y = top + row * (size[1] + GAP)
        write_lines(sheet, (GAP, y), side)
        pictures = ([original] if row == 0 else []) + list(cells[row * len(columns) : (row + 1) * len(columns)])
        for place, picture in enumerate(pictures, len(heads) - len(pictures)):
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (left + place * (size[0] + GAP), y))
    return sheet


def _label(key: str, value: float) -> str:
    return f"{key.replace('_', ' ')} {value:g}"
