"""How near a picture is to another, value by value, and its latents to noise.

Images are (B, 3, H, W) in [-1, 1]; their 8-bit values count.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from icd_lightning.data.images import quantize
from icd_lightning.metrics.base import FACTS, PerImage


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for each image, (B,), on the 8-bit values that a PNG would hold.

    Identical images give infinity.
    """
    return -10 * torch.log10(mse(images, reference))


def mse(images: Tensor, reference: Tensor) -> Tensor:
    """Mean squared difference for each image, (B,), of 8-bit values taken as fractions of 255."""
    return ((quantize(images) - quantize(reference)) / 255).square().mean((1, 2, 3))


class PSNR(PerImage):
    """Mean over images of their `psnr`, in dB."""

    higher_is_better = True
    digits = 2
    values = staticmethod(psnr)


class MSE(PerImage):
    """Mean over images of their `mse`."""

    higher_is_better = False
    values = staticmethod(mse)


class SSIM(PerImage):
    """Structural similarity (Wang et al., 2004), Gaussian window of 11 pixels, on 8-bit values."""

    higher_is_better, least = True, 11

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return structural_similarity_index_measure(
            quantize(images), quantize(reference), data_range=255.0, reduction="none"
        )


class LatentNLL(PerImage):
    """Mean over images of -log N(noise; 0, I) per dimension (Table 1, arXiv:2406.14539).

    True noise has (1 + log 2 pi) / 2 = 1.419; less is noise too quiet, more noise too loud.
    """

    needs = ("noise",)
    digits = 3

    def values(self, noise: Tensor) -> Tensor:
        return 0.5 * (noise.float().square().flatten(1).mean(1) + math.log(2 * math.pi))


class Within(PerImage):
    """Another metric of pictures whose other part is black: all but what was to be edited, or all but what was not.

    As PIE-Bench counts (arXiv:2310.01506): pictures are multiplied by the mask or by 1 - mask, and still averaged over
    *all* pixels, so that a small part looks good. A picture of which nothing is left has no value and is not counted.
    """

    def __init__(self, metric: PerImage, *, edited: bool) -> None:
        super().__init__()
        self.metric, self.edited = metric, edited
        self.needs = (*metric.needs, "masks")
        vars(self).update({fact: getattr(metric, fact) for fact in FACTS})  # torchmetrics' setattr refuses some

    def check_side(self, pixels: int) -> None:
        self.metric.check_side(pixels)

    def values(self, *inputs: Any) -> Tensor:
        *inputs, masks = inputs
        pairs = zip(self.metric.needs, inputs, strict=True)
        region, shown = self._region(masks), ("images", "reference")
        parts = [quantize(x) * region / 127.5 - 1 if need in shown else x for need, x in pairs]
        return self.metric.values(*parts).where(self.counted(masks), torch.nan)

    def counted(self, *inputs: Any) -> Tensor:
        return self._region(inputs[-1]).flatten(1).any(1)

    def _region(self, masks: Tensor) -> Tensor:
        return masks.bool() if self.edited else ~masks.bool()
