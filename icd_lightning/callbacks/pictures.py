"""Pictures for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


def log_grid(trainer: lightning.Trainer, name: str, rows: Sequence[Tensor], *, enlarge: int = 2) -> None:
    """Log rows of pictures (B, 3, H, W) in [-1, 1], one below the other, where the trainer has a TensorBoard log."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            grid = torch.cat([torch.cat(list(row.float().cpu()), dim=2) for row in rows], dim=1)
            grid = grid.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)
            logger.experiment.add_image(name, (grid.clamp(-1, 1) + 1) / 2, trainer.global_step)
