"""The Inception network of 2015 that FID is defined by: torchvision's, but for how four kinds of block pool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models.inception import Inception3

from icd_lightning.metrics.pretrained import find_file, frozen, load_weights

INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SIZE = 299
NUM_CLASSES = 1008  # of the head, which nothing uses

# TensorFlow leaves the padding out of an average, and this network's last block takes the maximum.
_average = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
POOLS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _average),
    "Mixed_7b": _average,
    "Mixed_7c": _maximum,
}


class Inception2015(nn.Module):
    """Images to features (B, 2048); `prepare` makes pixels in 0 ... 255 (B, 3, 299, 299) of them."""

    num_features = 2048

    def __init__(self, weights: dict[str, Tensor], prepare: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.prepare = prepare
        with torch.device("meta"):  # every weight is then a loaded one
            network = Inception3(num_classes=NUM_CLASSES, aux_logits=False, init_weights=False)
        network.load_state_dict(weights, assign=True)
        network.fc = nn.Identity()
        for name, pool in POOLS.items():
            setattr(network, name, _OtherPool(getattr(network, name), pool))
        self.network = frozen(network)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((self.prepare(images) - 128) / 128)


class _OtherPool(nn.Module):
    """A block of torchvision's whose last branch, a pooling and a convolution, pools otherwise."""

    def __init__(self, block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.pool = block, pool

    def forward(self, x: Tensor) -> Tensor:
        *others, _ = self.block._forward(x)
        return torch.cat([*others, self.block.branch_pool(self.pool(x))], dim=1)


def load_inception(metric: str, prepare: Callable[[Tensor], Tensor]) -> Inception2015:
    """The network; FileNotFoundError, with what to fetch, where its weights are not on this machine."""
    return Inception2015(load_weights(find_file(INCEPTION_URL, metric)), prepare)


def resize_like_tensorflow(x: Tensor, size: int) -> Tensor:
    """Bilinear (B, C, size, size) of x (B, C, H, W) as TensorFlow 1 did it: pixel i lies at i, not at i + 1/2."""
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(size, device=x.device) * (length / size)
        low = at.long()
        high = (low + 1).clamp(max=length - 1)
        share = (at - low).view([-1 if axis == dim else 1 for axis in range(4)])
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x
