"""Pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from icd_lightning.data.images import to_pictures
from icd_lightning.evaluation.report import Panel

CELL = 128  # pixels of a picture in a grid, at least


def log_grid(trainer: lightning.Trainer, name: str, rows: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    """Log a `grid` where the trainer has a TensorBoard log, on rank 0."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_image(name, grid(rows, captions), trainer.global_step, dataformats="HWC")


def grid(rows: Mapping[str, Tensor], captions: Sequence[str]) -> NDArray[np.uint8]:
    """One picture of rows of images (B, 3, H, W) in [-1, 1], labelled at the left, with captions above the columns."""
    from icd_lightning.evaluation.report.canvas import MAX_PICTURE, MIN_LABEL, PICTURE_GAP, draw_body

    pictures = {label: to_pictures(images.float()) for label, images in rows.items()}
    count, _, width = next(iter(pictures.values())).shape[:3]
    heads = tuple(f"\n{caption}" for caption in captions[:count])  # in small letters
    panel = Panel("", "", heads, tuple((label, tuple(shown)) for label, shown in pictures.items()))
    canvas = draw_body(panel, width=MIN_LABEL + count * (MAX_PICTURE + PICTURE_GAP))
    return canvas.pixels(scale=max(width, CELL) / MAX_PICTURE)


def noise_images(noise: Tensor, images: Tensor) -> Tensor:
    """Three channels of noise (B, C, h, w) as colours, as large as images (B, 3, H, W): no picture should show."""
    colors = (noise[:, :3].float() / 3).clamp(-1, 1)  # three standard deviations
    return interpolate(colors, size=images.shape[-2:], mode="nearest")
