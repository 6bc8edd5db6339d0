"""How far the distribution of pictures is from that of references. Images are (B, 3, H, W) in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d
from torchvision.models.inception import Inception3
from torchvision.transforms.functional import InterpolationMode, center_crop

from icd_lightning.data.images import quantize
from icd_lightning.data.manifest import sha256
from icd_lightning.files import check_file
from icd_lightning.metrics.base import PictureMetric, pillow_squares
from icd_lightning.metrics.pretrained import find_file, frozen, load_weights

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SIZE, NUM_FEATURES = 299, 2048
NUM_CLASSES = 1008  # of the head, which nothing uses

# TensorFlow leaves the padding out of an average, and this network's last block takes the maximum.
_average = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
AVERAGING = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
POOLS = {**dict.fromkeys(AVERAGING, _average), "Mixed_7c": _maximum}


class FrechetDistance(PictureMetric):
    """Frechet distance between Gaussians fitted to the features of images and of references (arXiv:1706.08500).

    reference_stats: a file of the references' mean and covariance, which then takes the place of reference pictures.
    """

    higher_is_better = False

    def __init__(self, network: nn.Module, num_features: int, reference_stats: str | Path | None = None) -> None:
        super().__init__()
        self.network = network
        if reference_stats is None:
            fixed = torch.zeros(0, num_features).double(), torch.zeros(0, num_features, num_features).double()
        else:
            fixed = read_statistics(reference_stats, num_features)
            vars(self).update(needs=("images",), version=f"{self.version} of {sha256(Path(reference_stats))}")
        self.register_buffer("fixed_means", fixed[0], persistent=False)
        self.register_buffer("fixed_covariances", fixed[1], persistent=False)
        sides = len(self.needs)
        self.add_state("sums", torch.zeros(sides, num_features).double(), dist_reduce_fx="sum")
        self.add_state("products", torch.zeros(sides, num_features, num_features).double(), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def prepared(self, images: Tensor) -> Tensor:
        return images

    def features(self, images: Tensor) -> Tensor:
        """Features (B, F)."""
        return self.network(self.prepared(images))

    def take(self, *inputs: Tensor) -> None:
        features = torch.stack([self.features(images) for images in inputs]).double()
        self.sums += features.sum(1)
        self.products += features.mT @ features
        self.count += features.shape[1]

    def compute(self) -> Tensor:
        """The distance, NaN of pictures that are not finite; ValueError for less than two: they have no covariance."""
        if (count := int(self.count)) < 2:
            raise ValueError(f"a Frechet distance of {count} pictures does not exist: measure on two or more, on many")
        if not self.sums.isfinite().all():  # eigenvalues of such are an error
            return torch.tensor(torch.nan)
        means = self.sums / count
        covariances = (self.products - count * means[..., None] * means[:, None]) / (count - 1)
        means, covariances = torch.cat([means, self.fixed_means]), torch.cat([covariances, self.fixed_covariances])
        # |m - n|^2 + trace(A + B - 2 (A B)^1/2) of means m, n and covariances A, B
        values, vectors = torch.linalg.eigh(covariances[0])
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        # A^1/2 B A^1/2 has the eigenvalues of A B and, symmetric, none that rounding makes complex.
        roots = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt()
        traces = covariances.diagonal(dim1=1, dim2=2).sum()
        return ((means[0] - means[1]).square().sum() + traces - 2 * roots.sum()).float()


def read_statistics(file: str | Path, num_features: int) -> tuple[Tensor, Tensor]:
    """Means (1, F) and covariances (1, F, F) of an .npz file as pytorch-fid saves it; ValueError for any other."""
    try:
        check_file(Path(file))
        with np.load(file, allow_pickle=False) as stored:
            mean, covariance = (stored[name].astype(np.float64) for name in ("mu", "sigma"))
    except Exception as error:  # numpy raises many kinds for what is no such file
        raise ValueError(
            f"reference_stats {file} is no .npz file of mu and sigma, as pytorch-fid's ({error})"
        ) from error
    shapes = (num_features,), (num_features, num_features)
    if (mean.shape, covariance.shape) != shapes or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(
            f"reference_stats {file}: mu {mean.shape} and sigma {covariance.shape} must have the shapes {shapes[0]} "
            f"and {shapes[1]}, of this network's features, and be finite"
        )
    return torch.from_numpy(mean)[None], torch.from_numpy(covariance)[None]


class FID(FrechetDistance):
    """FID as the paper's evaluation has it: pytorch-fid's, of pictures that Lanczos resized to 256."""

    version = 2  # 1 resized as `fid-tf`
    label = "FID"

    def __init__(self, reference_stats: str | None = None) -> None:
        super().__init__(inception_2015(load_weights(find_file(INCEPTION_URL))), NUM_FEATURES, reference_stats)

    def prepared(self, images: Tensor) -> Tensor:
        """Pixels in [-1, 1] (B, 3, 299, 299)."""
        squares = pillow_squares(images, 256, InterpolationMode.LANCZOS) / 255
        return 2 * interpolate(squares, [INCEPTION_SIZE] * 2, mode="bilinear", align_corners=False) - 1


class FIDTensorFlow(FID):
    """FID of the same pictures of 256, resized for the network as TensorFlow 1 and torch-fidelity do it.

    Their bilinear lets pixel i lie at i, not at i + 1/2.
    """

    version = 1

    def prepared(self, images: Tensor) -> Tensor:
        x = pillow_squares(images, 256, InterpolationMode.LANCZOS)
        at = torch.arange(INCEPTION_SIZE, device=x.device) * (256 / INCEPTION_SIZE)
        left = at.long()
        right = (left + 1).clamp(max=255)
        x = torch.lerp(x[:, :, left], x[:, :, right], (at - left)[:, None])
        x = torch.lerp(x[..., left], x[..., right], at - left)
        return (x - 128) / 128


class FIDClean(FID):
    """FID with the preprocessing of clean-fid (arXiv:2104.11222): antialiased bicubic, unrounded."""

    version = 1

    def prepared(self, images: Tensor) -> Tensor:
        squares = center_crop(quantize(images), [min(images.shape[-2:])])
        resized = interpolate(squares, [INCEPTION_SIZE] * 2, mode="bicubic", antialias=True)
        return (resized.clamp(0, 255) - 128) / 128


# --- the Inception network of 2015 that FID is defined by: torchvision's, but for how four kinds of block pool ------


def inception_2015(weights: dict[str, Tensor]) -> nn.Module:
    """The network from pixels in [-1, 1] (B, 3, 299, 299) to features (B, 2048)."""
    with torch.device("meta"):  # every weight is then a loaded one
        network = Inception3(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
    network.load_state_dict(weights, assign=True)
    network.fc = nn.Identity()
    for name, pool in POOLS.items():
        setattr(network, name, _OtherPool(getattr(network, name), pool))
    return frozen(network)


class _OtherPool(nn.Module):
    """A block of torchvision's whose last branch, a pooling and a convolution, pools otherwise."""

    def __init__(self, block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.convolution, self.pool = block, block.branch_pool, pool
        block.branch_pool = nn.Identity()  # the block then ends with x itself, pooled as torchvision does it

    def forward(self, x: Tensor) -> Tensor:
        others = self.block(x)[:, : -x.shape[1]]
        return torch.cat([others, self.convolution(self.pool(x))], dim=1)
