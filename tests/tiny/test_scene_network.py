"""The network that reads pictures: one answer for each attribute, and the same after a trip through its files."""

import pytest
import torch

from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import LABELS, scene_at


@pytest.fixture
def network() -> SceneNetwork:
    torch.manual_seed(0)
    return SceneNetwork((8, 8, 16, 16), feature_dim=12).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return scene_batch([scene_at(0, index) for index in range(3)], [""] * 3).images


@torch.no_grad()
def test_every_attribute_gets_its_options(network, images):
    logits = network(images)
    assert {name: value.shape for name, value in logits.items()} == {n: (3, len(o)) for n, o in LABELS.items()}
    assert network.features(images).shape == (3, 12)
    read = network.read(images)
    assert read.dtype == torch.long
    assert torch.equal(read, torch.stack([value.argmax(1) for value in logits.values()], 1))


def test_gradients_reach_every_weight(network, images):
    sum(value.square().sum() for value in network(images).values()).backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_it_survives_its_files(network, images, tmp_path, half):
    """In half precision too, as it ships: loaded it is float32, frozen and in evaluation mode."""
    expected = network(images)
    (network.half() if half else network).save_pretrained(tmp_path / "network")
    again = SceneNetwork.from_pretrained(tmp_path / "network")
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for name, logits in again(images).items():
        tolerance = 1e-2 if half else 0
        torch.testing.assert_close(logits, expected[name], atol=tolerance, rtol=tolerance)


def test_mistakes_are_named(network, tmp_path):
    with pytest.raises(ValueError, match=r"reads pictures of 64 x 64 pixels, got \(32, 64\)"):
        network(torch.zeros(1, 3, 32, 64))
    with pytest.raises(FileNotFoundError, match=r"no scene network at .*nowhere; `make tiny-weights` trains it"):
        SceneNetwork.from_pretrained(tmp_path / "nowhere")
