"""Frechet distances beside pytorch-fid and torch-fidelity, on features of pictures and on random Inception weights."""

import hashlib

import numpy as np
import pytest
import pytorch_fid.inception
import torch
from metrics_case import grey, noisy, scenes
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance, get_activations
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchvision.models.inception import Inception3
from torchvision.transforms import v2

from icd_lightning.data.images import to_pictures
from icd_lightning.metrics import distribution
from icd_lightning.metrics.distribution import FrechetDistance, inception_2015
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tiny.metrics import TinyFrechetDistance, load_scene_network


class Colors(nn.Module):
    """Six features: the mean colours of the halves."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.unflatten(-1, (2, -1)).mean((2, 4)).flatten(1)


def statistics(features: torch.Tensor) -> dict[str, np.ndarray]:
    """Of pytorch-fid's file."""
    values = features.double().numpy()
    return {"mu": values.mean(0), "sigma": np.cov(values, rowvar=False)}


def test_the_distance_is_pytorch_fid_s_and_torch_fidelity_s_however_the_pictures_come():
    images = scenes(96)[1]
    a, b = images[:48], images[48:] * 0.8
    metric = FrechetDistance(Colors(), 6)
    for part in (slice(0, 30), slice(30, 48)):
        metric.update(b[part], a[part])
    first, second = (statistics(Colors()(x)) for x in (b, a))
    expected = calculate_frechet_distance(*first.values(), *second.values())
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    expected = fid_statistics_to_metric(*(fid_features_to_statistics(Colors()(x).double()) for x in (b, a)), False)
    assert metric.compute().item() == pytest.approx(expected["frechet_inception_distance"], rel=1e-5)
    metric.reset()
    metric.update(a, a)
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


def test_fewer_pictures_than_features():
    """Covariances are singular then: the distance of three shifted pictures is their shift's."""
    images = scenes(3)[1] / 2
    metric = FrechetDistance(Colors(), 6)
    metric.update(images + 0.25, images)
    assert metric.compute().item() == pytest.approx(6 * 0.25**2, rel=1e-4)


def test_tiny_fd_is_that_of_the_scene_network_s_features():
    images = scenes(96)[1]
    metric, network = TinyFrechetDistance(), load_scene_network()
    metric.update(images[:48], images[48:])
    first, second = (statistics(network.features(x)) for x in (images[:48], images[48:]))
    assert metric.compute().item() == pytest.approx(
        calculate_frechet_distance(*first.values(), *second.values()), rel=1e-3
    )


def test_one_picture_has_no_covariance():
    metric = FrechetDistance(Colors(), 6)
    metric.update(grey(1), grey(2))
    with pytest.raises(ValueError, match="of 1 pictures does not exist"):
        metric.compute()


# Fixed statistics


def test_fixed_statistics_take_the_place_of_reference_pictures(tmp_path):
    images = scenes(48)[1]
    np.savez(tmp_path / "stats.npz", **statistics(Colors()(images[24:])))
    fixed, paired = FrechetDistance(Colors(), 6, tmp_path / "stats.npz"), FrechetDistance(Colors(), 6)
    fixed.update(images[:24])
    paired.update(images[:24], images[24:])
    torch.testing.assert_close(fixed.compute(), paired.compute())
    assert fixed.needs == ("images",)
    np.savez(tmp_path / "stats.npz", **statistics(Colors()(images[:24])))
    assert FrechetDistance(Colors(), 6, tmp_path / "stats.npz").version != fixed.version


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(6)}, "sigma"),
        (
            {"mu": np.zeros(7), "sigma": np.eye(7)},
            r"\(7,\) and sigma \(7, 7\) must have the shapes \(6,\) and \(6, 6\)",
        ),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "be finite"),
        ({"mu": np.zeros(6), "sigma": np.full((6, 6), np.inf)}, "be finite"),
        ({"mu": np.array([{}] * 6), "sigma": np.eye(6)}, "no .npz file of mu and sigma"),
        ({"mu": np.array(["x"] * 6), "sigma": np.eye(6)}, "no .npz file of mu and sigma"),
    ],
)
def test_other_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=rf"reference_stats .*stats.npz.*{message}"):
        FrechetDistance(Colors(), 6, tmp_path / "stats.npz")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_other_files_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "stats.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"stats.npz is no .npz file of mu and sigma, as pytorch-fid's \("):
        FrechetDistance(Colors(), 6, tmp_path / "stats.npz")


# FID


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Inception's, of the right names and shapes, random."""
    torch.manual_seed(0)
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for layer in network.modules():  # torch's own draw would let the picture fade from layer to layer
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
    return {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


@pytest.fixture
def inception_file(weights, metrics_home, monkeypatch):
    """Those weights where metrics look for Inception's."""
    torch.save(weights, metrics_home / "weights.pth")
    digest = hashlib.sha256((metrics_home / "weights.pth").read_bytes()).hexdigest()[:8]
    file = (metrics_home / "weights.pth").rename(metrics_home / f"inception-{digest}.pth")
    monkeypatch.setattr(distribution, "INCEPTION_URL", f"https://host/{file.name}")
    return file


def cut_to_256(images: torch.Tensor) -> list[Image.Image]:
    """As iCD's evaluation does it."""
    transform = v2.Compose([v2.Resize(256, v2.InterpolationMode.LANCZOS), v2.CenterCrop(256)])
    return [transform(Image.fromarray(picture)) for picture in to_pictures(images)]


def pytorch_fid_network(weights, monkeypatch) -> nn.Module:
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: weights)
    return pytorch_fid.inception.InceptionV3([3]).eval()


@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (300, 512)])
def test_fid_sees_what_pytorch_fid_sees(inception_file, weights, monkeypatch, size):
    images = noisy(2, size=size)[0]
    pixels = torch.stack([v2.functional.pil_to_tensor(picture) for picture in cut_to_256(images)]) / 255
    expected = pytorch_fid_network(weights, monkeypatch)(pixels)[0].flatten(1)
    (metric,) = build_metrics(["fid"]).values()
    torch.testing.assert_close(metric.features(images), expected, rtol=1e-4, atol=1e-5)


def test_fid_tf_sees_what_torch_fidelity_sees(inception_file):
    images = noisy(2, size=(300, 512))[0]
    theirs = FeatureExtractorInceptionV3("inception", ["2048"], str(inception_file))
    expected = theirs(torch.stack([v2.functional.pil_to_tensor(picture) for picture in cut_to_256(images)]))[0]
    (metric,) = build_metrics(["fid-tf"]).values()
    torch.testing.assert_close(metric.features(images), expected, rtol=1e-4, atol=1e-5)


FEW = 4
"""As many of Inception's features are compared in distance: pytorch-fid's matrix root of all 2048 takes minutes."""


class FirstFew(nn.Module):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :FEW]


def test_fid_against_fixed_statistics_is_pytorch_fid_s(inception_file, weights, monkeypatch, tmp_path):
    """From files of pictures to the distance, through a YAML file that names the statistics."""
    network, images = pytorch_fid_network(weights, monkeypatch), noisy(12, size=(320, 320))[0]
    for index, picture in enumerate(cut_to_256(images)):
        picture.save(tmp_path / f"{index:02}.png")
    files = sorted(tmp_path.glob("*.png"))
    features = torch.from_numpy(get_activations(files, network))[:, :FEW]
    first, second = (statistics(part) for part in (features[:6], features[6:]))
    np.savez(tmp_path / "stats.npz", **second)
    monkeypatch.setattr(distribution, "NUM_FEATURES", FEW)
    monkeypatch.setattr(
        distribution, "inception_2015", lambda weights: nn.Sequential(inception_2015(weights), FirstFew())
    )
    name = str(tmp_path / "fid_coco.yaml")
    (tmp_path / "fid_coco.yaml").write_text(
        "class_path: icd_lightning.metrics.distribution.FID\n"
        f"init_args: {{reference_stats: {tmp_path / 'stats.npz'}}}\n"
    )
    metric = build_metrics([name])[name]
    metric.update(images[:6])
    assert metric.compute().item() == pytest.approx(
        calculate_frechet_distance(*first.values(), *second.values()), rel=1e-3
    )


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (600, 512)])
def test_fid_clean_sees_pillow_s_unrounded_bicubic(inception_file, size):
    """Of the central square, as clean-fid prepares squares."""
    images = noisy(1, size=size)[0]
    (metric,) = build_metrics(["fid-clean"]).values()
    picture = to_pictures(images)[0]
    top, left = ((side - min(size)) // 2 for side in size)
    square = picture[top : top + min(size), left : left + min(size)].astype(np.float32)
    planes = [Image.fromarray(square[..., i]).resize((299, 299), Image.Resampling.BICUBIC) for i in range(3)]
    expected = torch.from_numpy(np.stack([np.asarray(plane).clip(0, 255) for plane in planes]))
    torch.testing.assert_close(metric.prepared(images)[0], (expected - 128) / 128, rtol=0, atol=2e-4)


def test_inception_that_lacks_a_weight_is_refused(weights):
    with pytest.raises(RuntimeError, match="Conv2d_1a_3x3"):
        inception_2015({name: value for name, value in weights.items() if "1a_3x3" not in name})
