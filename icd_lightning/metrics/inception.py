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
INCEPTION_SIZE, NUM_FEATURES = 299, 2048
NUM_CLASSES = 1008  # of the head, which nothing uses

# TensorFlow leaves the padding out of an average, and this network's last block takes the maximum.
_average = partial(avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_maximum = partial(max_pool2d, kernel_size=3, stride=1, padding=1)
AVERAGING = ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b")
POOLS = {**dict.fromkeys(AVERAGING, _average), "Mixed_7c": _maximum}


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


def load_inception() -> nn.Module:
    """The network with the weights on this machine."""
    return inception_2015(load_weights(find_file(INCEPTION_URL)))
