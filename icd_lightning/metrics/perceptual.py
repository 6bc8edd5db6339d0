"""How alike two pictures look to a pretrained network. Images are (B, 3, H, W) in [-1, 1]; 8-bit values count."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, normalize, resize

from icd_lightning.data.images import quantize, to_pictures
from icd_lightning.metrics.base import PerImage
from icd_lightning.metrics.pretrained import find_file, frozen, load_network, load_part, load_weights

LPIPS_TRUNKS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
DINOV2, DINO = "facebook/dinov2-base", "facebook/dino-vitb8"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class LPIPS(PerImage):
    """Mean LPIPS distance (Zhang et al., arXiv:1801.03924) with distance = network(a, b), (B, 1, 1, 1).

    Inputs in [-1, 1] at the pictures' own size, as the network was made for.
    """

    higher_is_better = False

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = frozen(network)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return self.network(*(self.prepared(x) for x in (images, reference))).flatten()

    def prepared(self, images: Tensor) -> Tensor:
        """What the network is given."""
        return quantize(images) / 127.5 - 1


class LPIPS224(LPIPS):
    """As in iCD's evaluation: inputs in [0, 1], not the [-1, 1] of the LPIPS paper, resized to 224 pixels."""

    def prepared(self, images: Tensor) -> Tensor:
        return _square(quantize(images) / 255, 224, antialias=True)


def lpips() -> LPIPS:
    """LPIPS as the paper's evaluation has it, with VGG16."""
    return LPIPS224(_load_lpips("vgg", "lpips"))


def lpips_squeeze() -> LPIPS:
    """LPIPS as PIE-Bench has it, with SqueezeNet."""
    return LPIPS(_load_lpips("squeeze", "lpips-squeeze"))


class DinoV2Similarity(PerImage):
    """Mean cosine of DinoV2's `pooler_output` over pairs of images, each prepared by the model's own processor."""

    higher_is_better = True

    def __init__(self) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__()
        self.processor = load_part("dinov2", DINOV2, AutoImageProcessor, backend="pil")
        self.network = load_network("dinov2", DINOV2, AutoModel)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return torch.cosine_similarity(self._embed(images), self._embed(reference))

    def _embed(self, images: Tensor) -> Tensor:
        pixels = self.processor(images=list(to_pictures(images)), return_tensors="pt")["pixel_values"]
        return self.network(pixels.to(images.device)).pooler_output


class StructureDistance(PerImage):
    """PIE-Bench's structure distance: mean squared difference of the self-similarities of DINO ViT-B/8's last keys.

    Self-similarity is the cosine between the keys of any two tokens, all heads joined, the class token among them. As
    in PIE-Bench's code, pictures are normalised as if they were in [0, 1] while they are in 0 ... 255, and resized to
    224 without antialiasing. Others than squares are cut, where PIE-Bench would let the network stretch its positions.
    """

    higher_is_better = False

    def __init__(self) -> None:
        from transformers import ViTModel

        super().__init__()
        options = {"add_pooling_layer": False, "layer_norm_eps": 1e-6}  # DINO's own; its config on the hub says 1e-12
        self.network = load_network("structure-distance", DINO, ViTModel, **options)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        difference = self._self_similarity(images) - self._self_similarity(reference)
        return difference.square().mean((1, 2))

    def _self_similarity(self, images: Tensor) -> Tensor:
        """Cosines (B, tokens, tokens)."""
        found: list[Tensor] = []
        last = self.network.layers[-1].attention.k_proj
        with last.register_forward_hook(lambda module, inputs, output: found.append(output)):
            self.network(normalize(_square(quantize(images), 224, antialias=False), *IMAGENET))
        keys = torch.nn.functional.normalize(found[0], dim=-1)
        return keys @ keys.transpose(1, 2)


def _square(images: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Short side resized to `size`, centre cut out: never stretched."""
    return center_crop(resize(images, [size], antialias=antialias), [size])


def _load_lpips(net: Literal["vgg", "squeeze"], metric: str) -> nn.Module:
    return lpips_network(net, load_weights(find_file(LPIPS_TRUNKS[net], metric)))


def lpips_network(net: Literal["vgg", "squeeze"], trunk: dict[str, Tensor]) -> nn.Module:
    """lpips' network with its own heads and torchvision's trunk, built without weights, so that none stays random."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # torchvision's, about the arguments that lpips gives it
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    # sliceN.<i>.weight is torchvision's features.<i>.weight
    weights = {f"net.{name}": trunk[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
    heads = load_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth")
    network.scaling_layer = lpips.ScalingLayer()  # constants
    network.load_state_dict(weights | heads, strict=False, assign=True)  # `lins` is `lin0` ... once more
    assert not any(value.is_meta for value in network.state_dict().values())
    return network
