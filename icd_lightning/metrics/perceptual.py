"""How alike two pictures look to a pretrained network. Images are (B, 3, H, W) in [-1, 1]; 8-bit values count."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, resize

from icd_lightning.data.images import quantize
from icd_lightning.metrics.base import PerImage, pillow_squares
from icd_lightning.metrics.pretrained import find_file, frozen, load_network, load_weights

LPIPS_TRUNKS = {
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
DINO = "facebook/dino-vitb8"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class LPIPS(PerImage):
    """Mean LPIPS distance (arXiv:1801.03924) with VGG16, of pictures resized to 224: piq's, as iCD's evaluation has it.

    trunk: the tensors of torchvision's network, where they are not those on this machine. They get lpips' own heads,
    in a network that is built without weights, so that none stays random.
    """

    net: ClassVar[Literal["vgg", "squeeze"]] = "vgg"
    version = 2  # 1 gave the network [0, 1]
    higher_is_better = False

    def __init__(self, trunk: dict[str, Any] | None = None) -> None:
        import lpips

        super().__init__()
        trunk = trunk or load_weights(find_file(LPIPS_TRUNKS[self.net]))
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # torchvision's, about the arguments that lpips gives it
            network = lpips.LPIPS(net=self.net, pretrained=False, pnet_rand=True, verbose=False)
        # sliceN.<i>.weight is torchvision's features.<i>.weight
        weights = {f"net.{name}": trunk[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        heads = load_weights(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{self.net}.pth")
        network.scaling_layer = lpips.ScalingLayer()  # constants
        network.load_state_dict(weights | heads, strict=False, assign=True)  # `lins` is `lin0` ... once more
        assert not any(value.is_meta for value in network.state_dict().values())
        self.network = frozen(network)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return self.network(*(self.prepared(x) for x in (images, reference))).flatten()

    def prepared(self, images: Tensor) -> Tensor:
        return pillow_squares(images, 224, InterpolationMode.BICUBIC) / 127.5 - 1


class SqueezeLPIPS(LPIPS):
    """LPIPS as PIE-Bench has it: with SqueezeNet, of pictures at their own size."""

    net, version, least = "squeeze", 1, 17

    def prepared(self, images: Tensor) -> Tensor:
        return quantize(images) / 127.5 - 1


class StructureDistance(PerImage):
    """PIE-Bench's structure distance: mean squared difference of the self-similarities of DINO ViT-B/8's last keys.

    Self-similarity is the cosine between the keys of any two tokens, all heads joined, the class token among them. As
    in PIE-Bench's code, pictures are normalised as if they were in [0, 1] while they are in 0 ... 255, and resized to
    224 without antialiasing. Others than squares are cut, where PIE-Bench would let the network stretch its positions.
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        options = {"add_pooling_layer": False, "layer_norm_eps": 1e-6}  # DINO's own; its config on the hub says 1e-12
        self.network = load_network(DINO, **options)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        difference = self._self_similarity(images) - self._self_similarity(reference)
        return difference.square().mean((1, 2))

    def _self_similarity(self, images: Tensor) -> Tensor:
        """Cosines (B, tokens, tokens)."""
        keys: list[Tensor] = []
        squares = center_crop(resize(quantize(images), [224], antialias=False), [224])
        last = self.network.layers[-1].attention.k_proj
        with last.register_forward_hook(lambda module, inputs, output: keys.append(output)):
            self.network(normalize(squares, *IMAGENET))
        unit = torch.nn.functional.normalize(keys[0], dim=-1)
        return unit @ unit.mT
