"""How far the distribution of pictures is from that of references. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms.functional import center_crop

from icd_lightning.data.images import quantize, resize_and_crop, to_pictures
from icd_lightning.metrics.base import PictureMetric
from icd_lightning.metrics.inception import INCEPTION_SIZE, load_inception, resize_like_tensorflow


class FrechetDistance(PictureMetric, FrechetInceptionDistance):
    """Frechet distance between Gaussians fitted to the features of images and of references (arXiv:1706.08500).

    `network` gives features (B, network.num_features) of images.
    """

    higher_is_better = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__(feature=network)
        self.orig_dtype = torch.float32  # of the result; torchmetrics knows it only after an update

    def take(self, images: Tensor, reference: Tensor) -> None:
        FrechetInceptionDistance.update(self, reference, real=True)
        FrechetInceptionDistance.update(self, images, real=False)

    def compute(self) -> Tensor:
        """The distance; ValueError for less than two pictures, which have no covariance."""
        if (count := int(self.fake_features_num_samples)) < 2:
            raise ValueError(f"a Frechet distance of {count} pictures does not exist: measure on two or more, on many")
        return super().compute()


def fid() -> FrechetDistance:
    """FID as the paper's evaluation has it: Lanczos to 256 and centre crop, then as TensorFlow's Inception resizes."""
    return FrechetDistance(load_inception("fid", prepare_paper))


def fid_clean() -> FrechetDistance:
    """FID with the preprocessing of clean-fid (arXiv:2104.11222): antialiased bicubic to 299, unrounded."""
    return FrechetDistance(load_inception("fid-clean", prepare_clean))


def prepare_paper(images: Tensor) -> Tensor:
    """Images to 0 ... 255 (B, 3, 299, 299), by way of 8-bit pictures of 256 x 256."""
    cut = [np.asarray(resize_and_crop(Image.fromarray(picture), 256)[0]) for picture in to_pictures(images)]
    pixels = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float().to(images.device)
    return resize_like_tensorflow(pixels, INCEPTION_SIZE)


def prepare_clean(images: Tensor) -> Tensor:
    """Images to 0 ... 255 (B, 3, 299, 299), from their central square, where clean-fid would stretch."""
    squares = center_crop(quantize(images), [min(images.shape[-2:])])
    size = [INCEPTION_SIZE, INCEPTION_SIZE]
    return torch.nn.functional.interpolate(squares, size, mode="bicubic", antialias=True).clamp(0, 255)
