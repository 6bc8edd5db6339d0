"""Pictures for metrics."""

import torch
from torch import Tensor

from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.scenes import Scene, scene_at

LEVEL = 2 / 255
"""One of the 255 steps of an 8-bit value, in images in [-1, 1]."""


def grey(level: float, count: int = 1, size: tuple[int, int] = (16, 16)) -> Tensor:
    """Images (count, 3, H, W) of one 8-bit value."""
    return torch.full((count, 3, *size), level / 127.5 - 1)


def noisy(count: int = 4, seed: int = 0, size: tuple[int, int] = (32, 32)) -> tuple[Tensor, Tensor]:
    """Images at growing distances from their references."""
    generator = torch.Generator().manual_seed(seed)
    reference = 2 * torch.rand(count, 3, *size, generator=generator) - 1
    error = torch.randn(reference.shape, generator=generator) * torch.linspace(0.02, 0.4, count).view(-1, 1, 1, 1)
    return (reference + error).clamp(-1, 1), reference


def scenes(count: int, seed: int = 5) -> tuple[list[Scene], Tensor]:
    """Scenes of the tiny world and their pictures (count, 3, 64, 64)."""
    found = [scene_at(seed, index) for index in range(count)]
    return found, scene_batch(found, [""] * count).images
