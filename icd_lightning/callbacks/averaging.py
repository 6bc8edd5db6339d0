"""Averages of the weights in training."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class ExponentialAverage(WeightAveraging):
    """Validate and export an exponential moving average of the trained weights, updated after every step.

    Lightning's EMAWeightAveraging averages by `decay a + (1 - decay) b`, which by rounding moves weights that never
    change, a bfloat16 base visibly; here what is frozen stays as it is, bit for bit.

    Args:
        decay: how much of the average stays at each step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay {decay} must lie between 0 and 1")

        def average(averaged: Tensor, current: Tensor, count: Tensor) -> Tensor:
            return torch.lerp(averaged, current, 1 - decay)

        super().__init__(use_buffers=False, avg_fn=average)  # buffers are copied
