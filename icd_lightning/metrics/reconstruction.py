"""How near a picture is to another, value by value. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.image import StructuralSimilarityIndexMeasure

from icd_lightning.data.images import quantize


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for each image, (B,), on the 8-bit values that a PNG would hold.

    Identical images give infinity.
    """
    error = (quantize(images) - quantize(reference)).square().mean((1, 2, 3))
    return 10 * torch.log10(255.0**2 / error)


class PSNR(MeanMetric):
    """Mean over images of their `psnr`, in dB; synchronised over ranks."""

    def update(self, images: Tensor, reference: Tensor) -> None:
        super().update(psnr(images, reference))


class SSIM(StructuralSimilarityIndexMeasure):
    """Structural similarity (Wang et al., 2004), Gaussian window of 11 pixels, on 8-bit values."""

    def __init__(self) -> None:
        super().__init__(data_range=255.0)

    def update(self, images: Tensor, reference: Tensor) -> None:
        super().update(quantize(images), quantize(reference))
