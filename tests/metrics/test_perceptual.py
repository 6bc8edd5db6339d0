"""LPIPS, DinoV2 and the structure distance, in the arithmetic of the libraries they come from."""

import lpips
import pytest
import torch
from metrics_case import noisy
from torch import nn
from torchvision.transforms.functional import normalize
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from icd_lightning.data.images import quantize, to_pictures
from icd_lightning.metrics.perceptual import (
    IMAGENET,
    LPIPS,
    LPIPS224,
    DinoV2Similarity,
    StructureDistance,
    lpips_network,
)
from icd_lightning.metrics.reconstruction import Within


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1


# LPIPS


def test_lpips_takes_every_weight_of_vgg16_and_its_own_heads():
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items() if name.startswith("features.")}
    weights = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    network = lpips_network("vgg", weights)
    assert len(network.net.state_dict()) == 26
    assert all((value == 0.01).all() for value in network.net.state_dict().values())
    assert (network.lin0.model[1].weight >= 0).all()  # the trained heads are not negative; random ones are
    black, white = torch.full((1, 3, 32, 32), -1.0), torch.ones(1, 3, 32, 32)
    assert network(black, black) == 0
    assert network(black, white) > 0
    with pytest.raises(KeyError):
        lpips_network("vgg", {name: value for name, value in weights.items() if "28" not in name})


@pytest.fixture(scope="module")
def squeeze() -> tuple[nn.Module, nn.Module]:
    """The package's own network, and ours of the same random trunk."""
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net="squeeze", pretrained=True, pnet_rand=True, verbose=False)
    trunk = {f"features.{name.split('.', 1)[1]}": value for name, value in theirs.net.state_dict().items()}
    return theirs, lpips_network("squeeze", trunk)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lpips_squeeze_is_the_package_s(squeeze):
    theirs, ours = squeeze
    pair = noisy(2, size=(64, 80))
    metric = LPIPS(ours)
    expected = theirs(*(quantize(x) / 255 for x in pair), normalize=True).flatten()
    torch.testing.assert_close(metric.per_image(*pair), expected)
    metric.update(*pair)
    torch.testing.assert_close(metric.compute(), expected.mean())
    assert (metric.per_image(pair[0], pair[0]) == 0).all()
    assert not metric.train().network.lin0.training  # its heads hold dropout


def test_what_lies_outside_the_mask_is_black_to_lpips(squeeze):
    images, reference = noisy(1, size=(64, 64))
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., :32, :] = 1
    blackened = [torch.where(masks.bool(), -1.0, quantize(x) / 127.5 - 1) for x in (images, reference)]
    metric = LPIPS(squeeze[1])
    found = Within(metric, edited=False).per_image(images, reference, masks=masks)
    torch.testing.assert_close(found, metric.per_image(*blackened))


class MeanDistance(nn.Module):
    """Mean squared difference, (B, 1, 1, 1), of what it is given."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[-2:] == (224, 224)
        assert a.min() >= 0
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_the_paper_s_lpips_sees_224_pixels_between_0_and_1(images):
    metric = LPIPS224(MeanDistance())
    metric.update(images[:1], images[:1])
    assert metric.compute() == 0
    metric.update(torch.ones(3, 3, 40, 56), torch.full((3, 3, 40, 56), -1.0))
    torch.testing.assert_close(metric.compute(), torch.tensor(3 / 4))
    cut = metric.per_image(images[:, :, :, 8:48], images[:, :, :, 8:48].flip(0))
    whole = metric.per_image(images, images.flip(0))  # a wider picture is cut, not squeezed
    torch.testing.assert_close(whole, cut, rtol=0, atol=2e-3)


# DinoV2


@pytest.fixture
def dinov2(metrics_home) -> DinoV2Similarity:
    """A DinoV2 of random weights, under a name that only this folder gives it."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(metrics_home / "dinov2-base")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**sizes).save_pretrained(metrics_home / "dinov2-base")
    return DinoV2Similarity()


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
    images, reference = noisy(2, size=(224, 224))
    found, expected = structure.per_image(images, reference), []
    for a, b in zip(images, reference, strict=True):
        maps = [self_similarity(structure.network, quantize(x[None])) for x in (a, b)]  # 0 ... 255, left so
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
