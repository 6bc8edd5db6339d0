"""Pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from icd_lightning.data.images import to_pictures
from icd_lightning.evaluation.drawing import Style, lines_height, wrap, write_lines

CELL = 128  # pixels of a picture in a grid, at least
LABELS = 72
TEXT = Style(12, "black")


def log_grid(trainer: lightning.Trainer, name: str, rows: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    """Log a `grid` where the trainer has a TensorBoard log, on rank 0."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_image(name, grid(rows, captions), trainer.global_step, dataformats="HWC")


def grid(rows: Mapping[str, Tensor], captions: Sequence[str]) -> NDArray[np.uint8]:
    """One picture of rows of images (B, 3, H, W) in [-1, 1], labelled at the left, with captions below the columns."""
    pictures = {label: to_pictures(images.float()) for label, images in rows.items()}
    count, height, width = next(iter(pictures.values())).shape[:3]
    scale = max(1, -(-CELL // width))
    height, width = height * scale, width * scale
    texts = [wrap(caption, TEXT, width - 8) for caption in captions[:count]]
    below = max(lines_height(text) for text in texts) + 8
    sheet = Image.new("RGB", (LABELS + count * width, len(rows) * height + below), "white")
    for row, (label, shown) in enumerate(pictures.items()):
        write_lines(sheet, (4, row * height + 4), wrap(label, TEXT, LABELS - 8))
        for column, picture in enumerate(shown):
            enlarged = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (LABELS + column * width, row * height))
    for column, text in enumerate(texts):
        write_lines(sheet, (LABELS + column * width + 4, len(rows) * height + 4), text)
    return np.asarray(sheet)


def noise_images(noise: Tensor, images: Tensor) -> Tensor:
    """Three channels of noise (B, C, h, w) as colours, as large as images (B, 3, H, W): no picture should show."""
    colors = (noise[:, :3].float() / 3).clamp(-1, 1)  # three standard deviations
    return interpolate(colors, size=images.shape[-2:], mode="nearest")
