"""Edits of one picture under many settings, as one picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from icd_lightning.data.images import resize_and_crop
from icd_lightning.evaluation.report import Panel, Report
from icd_lightning.evaluation.report.canvas import MAX_PICTURE, draw_report


def contact_sheet(
    original: Image.Image,
    prompts: tuple[str, str],
    grid: Mapping[str, Sequence[float]],
    cells: Sequence[Image.Image],
    *,
    name: str = "original",
) -> Image.Image:
    """Draw the cells, the grid's first key varying fastest: its values are the columns, those of all others the rows.

    Above them stand the prompts, of source and target; the first column is the picture that was edited, with its name.
    """
    columns_key, *row_keys = grid
    columns = [_label(columns_key, value) for value in grid[columns_key]]
    labels = [
        "\n".join(_label(key, value) for key, value in zip(row_keys[::-1], values, strict=True))
        for values in itertools.product(*(grid[key] for key in row_keys[::-1]))
    ]
    whole, _ = resize_and_crop(original, cells[0].height, cells[0].width)
    pictures = iter(map(np.asarray, cells))
    rows = tuple(
        (label, (None if index else np.asarray(whole), *itertools.islice(pictures, len(columns))))
        for index, label in enumerate(labels)
    )
    source, target = prompts
    panel = Panel("", "", (name, *columns), rows)
    sheet = draw_report(Report(target, f"was: {source}", sections=(panel,)))
    return Image.fromarray(sheet.pixels(scale=max(cells[0].width / MAX_PICTURE, 1)))


def _label(key: str, value: float) -> str:
    return f"{key.replace('_', ' ')} {value:g}"
