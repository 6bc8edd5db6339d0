"""Frechet distances against scipy, and what their networks are given against Pillow."""

import numpy as np
import pytest
import scipy.linalg
import torch
from metrics_case import grey, noisy, scenes
from PIL import Image
from torch import nn
from torchvision.models.inception import Inception3, InceptionA, InceptionE

from icd_lightning.data.images import quantize, to_pictures
from icd_lightning.metrics.distribution import FrechetDistance, prepare_clean, prepare_paper
from icd_lightning.metrics.inception import POOLS, Inception2015, _OtherPool, resize_like_tensorflow
from icd_lightning.tiny.metrics import TinyFrechetDistance, load_scene_network


class Brightness(nn.Module):
    """Two features of an image: the means of its halves, in 0 ... 255."""

    num_features = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return quantize(images).unflatten(-1, (2, -1)).mean((1, 2, 4))


def frechet(a: np.ndarray, b: np.ndarray, root_trace) -> float:
    """The formula, with root_trace(A, B) the trace of the root of A B."""
    first, second = (np.cov(x, rowvar=False) for x in (a, b))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second) - 2 * root_trace(first, second))


def by_scipy(first: np.ndarray, second: np.ndarray) -> float:
    return np.trace(scipy.linalg.sqrtm(first @ second)).real


def by_symmetry(first: np.ndarray, second: np.ndarray) -> float:
    """Of A^1/2 B A^1/2, which is symmetric and has the same eigenvalues; also of fewer pictures than features."""
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    return np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(0)).sum()


def test_of_known_features():
    generator = torch.Generator().manual_seed(0)
    metric = FrechetDistance(Brightness())
    levels = torch.rand(64, 1, 1, 2, generator=generator) * 1.2 - 0.8
    reference = levels.repeat_interleave(4, -1).expand(64, 3, 8, 8)
    metric.update(reference, reference)
    torch.testing.assert_close(metric.compute(), torch.tensor(0.0), rtol=0, atol=1e-2)
    metric.reset()
    metric.update(reference + 0.4, reference)  # the mean moves by 51 of 255 in both features, the spread stays
    torch.testing.assert_close(metric.compute(), torch.tensor(2 * 51.0**2), rtol=1e-3, atol=0)


class Colors(nn.Module):
    """Six features: the mean colours of the halves."""

    num_features = 6

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.unflatten(-1, (2, -1)).mean((2, 4)).flatten(1)


def test_it_is_scipy_s_however_the_pictures_come():
    images = scenes(96)[1]
    a, b = images[:48], images[48:] * 0.8
    metric = FrechetDistance(Colors())
    for part in (slice(0, 30), slice(30, 48)):
        metric.update(b[part], a[part])
    features = [Colors()(x).double().numpy() for x in (b, a)]
    assert metric.compute().item() == pytest.approx(frechet(*features, by_scipy), rel=1e-4)


def test_tiny_fd_is_that_of_the_scene_network_s_features():
    images = scenes(96)[1]
    metric, network = TinyFrechetDistance(), load_scene_network()
    metric.update(images[:48], images[48:])
    features = [network.features(x).double().numpy() for x in (images[:48], images[48:])]
    assert metric.compute().item() == pytest.approx(frechet(*features, by_symmetry), rel=1e-3)
    metric.reset()
    metric.update(images, images.flip(0))
    assert metric.compute().item() == pytest.approx(0, abs=0.02)


def test_one_picture_has_no_covariance():
    metric = FrechetDistance(Brightness())
    metric.update(grey(1), grey(2))
    with pytest.raises(ValueError, match="of 1 pictures does not exist"):
        metric.compute()


# What FID's network is given


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (600, 512)])
def test_clean_pictures_are_pillow_s_unrounded_bicubic(size):
    images = noisy(1, size=size)[0]
    found, picture = prepare_clean(images), to_pictures(images)[0]
    top, left = ((side - min(size)) // 2 for side in size)
    square = picture[top : top + min(size), left : left + min(size)].astype(np.float32)
    planes = [Image.fromarray(square[..., i]).resize((299, 299), Image.Resampling.BICUBIC) for i in range(3)]
    expected = torch.from_numpy(np.stack([np.asarray(plane).clip(0, 255) for plane in planes]))
    assert found.shape == (1, 3, 299, 299)
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0.02)


def test_paper_s_pictures_are_cut_to_256_by_lanczos():
    images = noisy(1, size=(300, 512))[0]
    picture = Image.fromarray(to_pictures(images)[0]).resize((437, 256), Image.Resampling.LANCZOS)
    cut = torch.from_numpy(np.array(picture.crop((90, 0, 346, 256)))).permute(2, 0, 1)[None].float()
    torch.testing.assert_close(prepare_paper(images), resize_like_tensorflow(cut, 299))


def test_tensorflow_s_bilinear_by_hand():
    x = torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]])
    expected = torch.tensor([[0.0, 2, 4, 4], [4, 6, 8, 8], [8, 10, 12, 12], [8, 10, 12, 12]])
    assert torch.equal(resize_like_tensorflow(x, 4)[0, 0], expected)
    assert torch.equal(resize_like_tensorflow(x, 2), x)


# Its network


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of the right names and shapes, random."""
    torch.manual_seed(0)
    network = Inception3(num_classes=1008, aux_logits=False, init_weights=False)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
    return {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}


def test_inception_takes_every_weight_and_gives_2048_features(weights):
    network = Inception2015(weights, prepare_clean)
    images = noisy(1)[0]
    assert network(images).shape == (1, 2048)
    assert not any(value.is_meta or value.requires_grad for value in network.parameters())
    with pytest.raises(RuntimeError, match="Conv2d_1a_3x3"):
        Inception2015({name: value for name, value in weights.items() if "1a_3x3" not in name}, prepare_clean)


def test_its_averages_leave_out_the_padding_and_its_last_block_takes_maxima():
    """On one level the average of a window is that level, at the border too."""
    torch.manual_seed(0)
    x = torch.full((1, 192, 5, 5), 3.0)
    block = InceptionA(192, pool_features=32).eval()
    plain, other = (network(x)[0, -32:] for network in (block, _OtherPool(block, POOLS["Mixed_5b"])))
    middle = other[:, 2:3, 2:3].expand_as(other)
    torch.testing.assert_close(other, middle)
    assert not torch.allclose(plain, middle)
    torch.testing.assert_close(_OtherPool(block, POOLS["Mixed_5b"])(x)[0, :-32], block(x)[0, :-32])
    peak = torch.zeros(1, 1280, 5, 5)
    peak[..., 2, 2] = 1
    last = _OtherPool(InceptionE(1280).eval(), POOLS["Mixed_7c"])(peak)[0, -192:]
    torch.testing.assert_close(last[:, 1:4, 1:4], last[:, 2:3, 2:3].expand(-1, 3, 3))
    assert last.detach()[:, 0, 0].abs().max() < 1e-6


def test_its_features_are_torch_fidelity_s(weights, tmp_path):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.save(weights, tmp_path / "weights.pth")
    theirs = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "weights.pth"))
    images = noisy(2, size=(256, 256))[0]
    expected = theirs(quantize(images).byte())[0]
    torch.testing.assert_close(Inception2015(weights, prepare_paper)(images), expected, rtol=1e-4, atol=1e-5)
