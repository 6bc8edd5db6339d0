"""LPIPS, DinoV2 and the structure distance, beside the libraries that their published figures were measured with."""

from pathlib import Path

import lpips
import numpy as np
import piq.perceptual
import pytest
import torch
import torchmetrics.functional.image.lpips as torchmetrics_lpips
from metrics_case import noisy, scenes
from PIL import Image
from torch import nn
from torch.nn.functional import interpolate
from torchvision.models import squeezenet1_1, vgg16
from torchvision.transforms.functional import normalize
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from icd_lightning.data.images import quantize, to_pictures
from icd_lightning.metrics.alignment import ImageCosine
from icd_lightning.metrics.perceptual import (
    IMAGENET,
    LPIPS,
    SqueezeLPIPS,
    StructureDistance,
)
from icd_lightning.metrics.pretrained import load_weights
from icd_lightning.metrics.reconstruction import Within
from icd_lightning.metrics.registry import build_metrics

HEADS = Path(lpips.__file__).parent / "weights" / "v0.1"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1


# LPIPS


def random_trunk(network) -> nn.Module:
    """torchvision's convolutions with random weights; its classifier stays without any."""
    torch.manual_seed(0)
    with torch.device("meta"):
        trunk = network()
    for layer in trunk.features.to_empty(device="cpu").modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return trunk


def weights_of(trunk: nn.Module) -> dict[str, torch.Tensor]:
    return {f"features.{name}": value for name, value in trunk.features.state_dict().items()}


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    return random_trunk(vgg16)


@pytest.fixture(scope="module")
def squeeze() -> nn.Module:
    return random_trunk(squeezenet1_1)


def test_lpips_is_piq_s_as_icd_calls_it(vgg, monkeypatch):
    """Which resizes by Pillow's default, bicubic, to 8 bits and gives [0, 1] to a network that normalises by itself."""
    heads = [value for _, value in sorted(load_weights(HEADS / "vgg.pth").items())]
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: heads)
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **_: vgg)
    theirs, pair = piq.LPIPS(reduction="none"), noisy(1, size=(300, 300))
    pixels = [
        torch.from_numpy(np.stack([np.array(Image.fromarray(p).resize((224, 224))) for p in to_pictures(images)]))
        for images in pair
    ]
    expected = theirs(*(x.permute(0, 3, 1, 2) / 255.0 for x in pixels))
    metric = LPIPS(weights_of(vgg))
    torch.testing.assert_close(metric.per_image(*pair), expected, rtol=1e-4, atol=1e-6)
    assert not metric.train().network.lin0.training  # its heads hold dropout


def test_lpips_cuts_other_shapes_than_squares(vgg):
    metric = LPIPS(weights_of(vgg))
    images, reference = scenes(2)[1].split(1)
    wide = [torch.cat([-x[..., :10], x, -x[..., -10:]], dim=3) for x in (images, reference)]
    cut, whole = metric.per_image(images, reference), metric.per_image(*wide)
    torch.testing.assert_close(whole, cut, rtol=0.02, atol=0)  # beyond the cut are pixels that resizing mixes in


def test_lpips_takes_every_weight_of_the_trunk(vgg):
    weights = weights_of(vgg)
    loaded = LPIPS(weights).network.net.state_dict()
    assert len(loaded) == len(weights) == 26
    with pytest.raises(KeyError):
        LPIPS({name: value for name, value in weights.items() if "28" not in name})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_squeeze_lpips_is_the_lpips_package_s_and_torchmetrics_s(squeeze, monkeypatch):
    weights, pair = weights_of(squeeze), noisy(2, size=(64, 80))
    found = SqueezeLPIPS(weights).per_image(*pair)
    theirs = lpips.LPIPS(net="squeeze", pretrained=True, pnet_rand=True, verbose=False).eval()
    sliced = theirs.net.state_dict()
    theirs.net.load_state_dict({name: weights[f"features.{name.split('.', 1)[1]}"] for name in sliced})
    inputs = [quantize(x) / 127.5 - 1 for x in pair]
    torch.testing.assert_close(found, theirs(*inputs).flatten())
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_, **__: squeeze.features)  # PIE-Bench's
    theirs = torchmetrics_lpips._LPIPS(net="squeeze", pretrained=True).eval()
    torch.testing.assert_close(found, theirs(*inputs).flatten(), rtol=1e-4, atol=1e-6)


def test_squeeze_lpips_is_of_pictures_that_its_network_has_a_pixel_left_of(squeeze):
    metric = SqueezeLPIPS(weights_of(squeeze))
    assert metric.per_image(*noisy(2, size=(17, 17))).isfinite().all()
    with pytest.raises(ValueError, match=r"SqueezeLPIPS is of pictures of 17 pixels .* got a side of 16"):
        metric.per_image(*noisy(2, size=(16, 17)))


def test_what_lies_outside_the_mask_is_black_to_lpips(squeeze):
    images, reference = noisy(1, size=(64, 64))
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., :32, :] = 1
    blackened = [torch.where(masks.bool(), -1.0, quantize(x) / 127.5 - 1) for x in (images, reference)]
    metric = SqueezeLPIPS(weights_of(squeeze))
    found = Within(metric, edited=False).per_image(images, reference, masks=masks)
    torch.testing.assert_close(found, metric.per_image(*blackened))


# DinoV2


@pytest.fixture
def dinov2(metrics_home) -> ImageCosine:
    """A DinoV2 of random weights, under a name that only this folder gives it."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(metrics_home / "dinov2-base")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**sizes).save_pretrained(metrics_home / "dinov2-base")
    return build_metrics(["dinov2"])["dinov2"]


def test_dinov2_of_identical_images_is_one(dinov2, images):
    dinov2.update(images, images)
    torch.testing.assert_close(dinov2.compute(), torch.tensor(1.0))


def test_dinov2_is_the_mean_cosine_of_pooled_outputs(dinov2, images):
    dinov2.update(images, images.flip(0))
    expected = []
    for a, b in zip(images, images.flip(0), strict=True):
        pooled = []
        for image in (a, b):
            pixels = dinov2.processor(images=[to_pictures(image[None])[0]], return_tensors="pt")["pixel_values"]
            assert pixels.shape == (1, 3, 28, 28)
            pooled.append(dinov2.network(pixels).pooler_output[0])
        expected.append(torch.dot(*pooled) / (pooled[0].norm() * pooled[1].norm()))
    torch.testing.assert_close(dinov2.compute(), torch.stack(expected).mean())
    assert dinov2.compute() < 1


# The structure distance


@pytest.fixture
def structure(metrics_home) -> StructureDistance:
    """Of a DINO of random weights and large patches."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    ViTModel(ViTConfig(**sizes, image_size=224, patch_size=32, initializer_range=0.5)).save_pretrained(
        metrics_home / "dino-vitb8"
    )
    return StructureDistance()


def self_similarity(network: ViTModel, pixels: torch.Tensor) -> torch.Tensor:
    """Of one picture, key by key: PIE-Bench's arithmetic, from what enters the last block."""
    block = network.layers[-1]
    entering = network(normalize(pixels, *IMAGENET), output_hidden_states=True).hidden_states[-2]
    keys = block.attention.k_proj(block.layernorm_before(entering))[0]
    return torch.stack([torch.cosine_similarity(key, keys, dim=-1) for key in keys])


def test_structure_distance_by_piebench_s_arithmetic(structure):
    images, reference = noisy(2, size=(512, 512))
    found, expected = structure.per_image(images, reference), []
    for a, b in zip(images, reference, strict=True):
        pair = [interpolate(quantize(x[None]), [224, 224], mode="bilinear") for x in (a, b)]  # 0 ... 255, left so
        maps = [self_similarity(structure.network, pixels) for pixels in pair]
        assert maps[0].shape == (50, 50)
        expected.append((maps[0] - maps[1]).square().mean())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-6)
    assert (found > 0).all()
    assert structure.network.config.layer_norm_eps == 1e-6


def test_structure_of_itself_is_at_no_distance_and_other_shapes_are_cut(structure):
    images, reference = noisy(2, size=(40, 60))
    assert (structure.per_image(images, images) == 0).all()
    squares = [x[..., 10:50] for x in (images, reference)]
    torch.testing.assert_close(
        structure.per_image(images, reference), structure.per_image(*squares), rtol=0.2, atol=1e-3
    )
