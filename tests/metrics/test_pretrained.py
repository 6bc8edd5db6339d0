import hashlib

import pytest
import torch
from torch import nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from icd_lightning.metrics import pretrained
from icd_lightning.metrics.pretrained import FID, LPIPS, DinoV2Similarity
from icd_lightning.metrics.registry import METRICS, build_metrics


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An ICD_METRICS_HOME, and caches with nothing in them."""
    monkeypatch.setenv("ICD_METRICS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0)) * 2 - 1


# What is missing


@pytest.mark.parametrize(
    ("name", "to_fetch"),
    [
        ("lpips", "https://download.pytorch.org/models/vgg16-397923af.pth"),
        ("fid", "https://.*/pt_inception-2015-12-05-6726825d.pth"),
        ("dinov2", "facebook/dinov2-base"),
    ],
)
def test_a_missing_network_ends_early_with_what_to_fetch_and_how_to_go_without(home, name, to_fetch):
    message = rf"metric {name} lacks its network: put {to_fetch}.* into {home}, or go without, e\.g\. metrics: \[psnr"
    with pytest.raises(FileNotFoundError, match=message):
        build_metrics(["psnr", name])


def test_without_a_home_the_message_names_the_variable(home, monkeypatch):
    monkeypatch.delenv("ICD_METRICS_HOME")
    with pytest.raises(FileNotFoundError, match="a folder named by ICD_METRICS_HOME"):
        METRICS["lpips"]()


@pytest.mark.parametrize("name", ["lpips", "fid"])
def test_a_file_that_is_not_what_its_name_says_is_refused(home, name):
    url = {"lpips": pretrained.VGG16_URL, "fid": pretrained.INCEPTION_URL}[name]
    (home / url.rsplit("/", 1)[1]).write_bytes(b"another network")
    with pytest.raises(ValueError, match="is damaged or not what its name says"):
        METRICS[name]()


def test_torch_hub_s_cache_is_looked_into_after_home(home):
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    cache = home.parent / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / name).write_bytes(content)
    assert pretrained._find(f"https://host/{name}", "lpips") == cache / name
    (home / name).write_bytes(content)
    assert pretrained._find(f"https://host/{name}", "lpips") == home / name


def test_fid_without_its_package_says_so(home, monkeypatch):
    monkeypatch.setattr(pretrained, "_find", lambda url, metric: home)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch-fidelity, or go without"):
        pretrained.fid()


# LPIPS


def test_lpips_takes_every_weight_of_vgg16_and_its_own_heads():
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items() if name.startswith("features.")}
    weights = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    network = pretrained._lpips_vgg16(weights)
    assert len(network.net.state_dict()) == 26
    assert all((value == 0.01).all() for value in network.net.state_dict().values())
    assert (network.lin0.model[1].weight >= 0).all()  # the trained heads are not negative; random ones are
    black, white = torch.full((1, 3, 32, 32), -1.0), torch.ones(1, 3, 32, 32)
    assert network(black, black) == 0
    assert network(black, white) > 0
    with pytest.raises(KeyError):
        pretrained._lpips_vgg16({name: value for name, value in weights.items() if "28" not in name})


class MeanDistance(nn.Module):
    """Mean squared difference, (B, 1, 1, 1), of what it is given."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[-2:] == (224, 224)
        assert a.min() >= 0
        return (a - b).square().mean((1, 2, 3), keepdim=True)


def test_lpips_is_the_mean_over_images_of_the_network_s_distances(images):
    metric = LPIPS(MeanDistance())
    metric.update(images[:1], images[:1])
    assert metric.compute() == 0
    metric.update(torch.ones(3, 3, 40, 56), torch.full((3, 3, 40, 56), -1.0))
    torch.testing.assert_close(metric.compute(), torch.tensor(3 / 4))
    metric.reset()
    metric.update(images[:, :, :, 8:48], images[:, :, :, 8:48].flip(0))
    expected = metric.compute()
    metric.reset()
    metric.update(images, images.flip(0))  # a wider picture is cut, not squeezed
    torch.testing.assert_close(metric.compute(), expected, rtol=0, atol=2e-3)


# DinoV2


@pytest.fixture
def dinov2(home) -> DinoV2Similarity:
    """A DinoV2 of random weights, under a name that only this folder gives it."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(home / "dinov2-base")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessor(**sizes).save_pretrained(home / "dinov2-base")
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
            picture = ((image + 1) * 127.5).round().byte()
            pixels = dinov2.processor(images=[picture], return_tensors="pt")["pixel_values"]
            assert pixels.shape == (1, 3, 28, 28)
            pooled.append(dinov2.network(pixels).pooler_output[0])
        expected.append(torch.dot(*pooled) / (pooled[0].norm() * pooled[1].norm()))
    torch.testing.assert_close(dinov2.compute(), torch.stack(expected).mean())
    assert dinov2.compute() < 1


# FID


class Brightness(nn.Module):
    """Two features of an image uint8 (B, 3, H, W): the means of its halves."""

    num_features = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().unflatten(-1, (2, -1)).mean((1, 2, 4))


def test_fid_of_known_features():
    generator = torch.Generator().manual_seed(0)
    metric = FID(feature=Brightness(), input_img_size=(3, 8, 8))
    levels = torch.rand(64, 1, 1, 2, generator=generator) * 1.2 - 0.8
    reference = levels.repeat_interleave(4, -1).expand(64, 3, 8, 8)
    metric.update(reference, reference)
    torch.testing.assert_close(metric.compute(), torch.tensor(0.0), rtol=0, atol=1e-2)
    metric.reset()
    metric.update(reference + 0.4, reference)  # the mean moves by 51 of 255 in both features, the spread stays
    torch.testing.assert_close(metric.compute(), torch.tensor(2 * 51.0**2), rtol=1e-3, atol=0)
