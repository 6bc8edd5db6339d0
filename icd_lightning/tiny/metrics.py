"""What the shipped scene network sees in pictures of the tiny world: stand-ins under names of their own.

They are no FID, CLIP or LPIPS, and comparable with nothing but each other. Images are (B, 3, 64, 64) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from icd_lightning.data.images import quantize
from icd_lightning.metrics.base import PerImage, where_finite
from icd_lightning.metrics.distribution import FrechetDistance
from icd_lightning.models.sources import shipped
from icd_lightning.tiny.scene_network import SceneNetwork, caption_labels
from icd_lightning.tiny.scenes import ABSENT

HALVING = 6  # modules of the network's body to each halving of the picture


def load_scene_network() -> SceneNetwork:
    """The one that comes with the package, whatever family is measured, so that figures stay comparable."""
    return SceneNetwork.from_pretrained(shipped() / "scene_network")


def psnr_within(images: Tensor, reference: Tensor, region: Tensor) -> Tensor:
    """PSNR in dB over the pixels where region (B, 1, H, W) is 1, (B,), NaN where there are none: no `psnr-edited`."""
    error = (quantize(images) - quantize(reference)).square() * region
    return 10 * torch.log10(255.0**2 * 3 * region.sum((1, 2, 3)) / error.sum((1, 2, 3)))


class TinyFrechetDistance(FrechetDistance):
    """`tiny-fd`: Frechet distance between the scene network's features of pictures and of references."""

    def __init__(self) -> None:
        network = load_scene_network()
        super().__init__(network, network.config["feature_dim"])

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(images.float())


class TinyAgreement(PerImage):
    """`tiny-agreement`: mean share of a caption's attributes that the scene network reads in its picture."""

    needs = ("images", "prompts")
    higher_is_better = True
    digits, factor = 1, 100
    label = "attributes as in the caption (%)"

    def __init__(self) -> None:
        super().__init__()
        self.network = load_scene_network()

    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        stated = torch.stack([caption_labels(prompt) for prompt in prompts]).to(images.device)
        counted = stated != ABSENT
        right = (self.network.read(images.float()) == stated) & counted
        return where_finite(right.sum(1) / counted.sum(1), images)


class TinyPerceptualDistance(PerImage):
    """`tiny-perceptual`: how far two pictures are from each other to the scene network; mean over images.

    As LPIPS without its learnt weights: maps after each halving, their channels brought to unit length at every place,
    squared differences summed over channels, averaged over places and over maps.
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.network = load_scene_network()

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        pairs = zip(self._maps(images), self._maps(reference), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).mean(0)

    def _maps(self, images: Tensor) -> list[Tensor]:
        x, maps = images.float(), []
        self.network.features(x[:0])  # complains of another size of picture
        for start in range(0, len(self.network.config["channels"]) * HALVING, HALVING):
            x = self.network.body[start : start + HALVING](x)
            maps.append(normalize(x, dim=1))
        return maps
