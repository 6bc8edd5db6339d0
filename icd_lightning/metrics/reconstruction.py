"""How near a picture is to another, value by value. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for each image, (B,), on the 8-bit values that a PNG would hold.

    Identical images give infinity.
    """
    a, b = quantize(images), quantize(reference)
    return 10 * torch.log10(255.0**2 / (a - b).square().mean((1, 2, 3)))


def quantize(images: Tensor) -> Tensor:
    """Images in [-1, 1] to the nearest of 0, 1, ..., 255, float32."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()
