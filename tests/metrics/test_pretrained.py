"""Where pretrained networks come from: the real ones or none."""

import hashlib

import pytest
import torch
from transformers import ViTConfig, ViTModel

from icd_lightning.metrics import pretrained
from icd_lightning.metrics.distribution import INCEPTION_URL
from icd_lightning.metrics.perceptual import DINO, LPIPS_TRUNKS
from icd_lightning.metrics.registry import OWN, build_metrics

TO_FETCH = {
    "lpips": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "lpips-squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
    "fid": "https://.*/pt_inception-2015-12-05-6726825d.pth",
    "fid-tf": "https://.*/pt_inception-2015-12-05-6726825d.pth",
    "fid-clean": "https://.*/pt_inception-2015-12-05-6726825d.pth",
    "dinov2": r"facebook/dinov2-base \(hf download",
    "structure-distance": r"facebook/dino-vitb8 \(hf download",
    "clip-t": r"openai/clip-vit-large-patch14 \(hf download",
    "clip-i": r"openai/clip-vit-large-patch14 \(hf download",
    "clip-score": r"openai/clip-vit-large-patch14 \(hf download",
    "image-reward": r"THUDM/ImageReward \(hf download THUDM/ImageReward ImageReward.pt\)",
}
WITHOUT = {"psnr", "ssim", "mse", "latent-nll"}


@pytest.mark.parametrize("name", sorted(OWN.keys() - WITHOUT))
def test_a_missing_network_ends_early_with_what_to_fetch_and_how_to_go_without(metrics_home, name, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("something was looked for online"))
    go_without = r"or go without, e\.g\. metrics: \[psnr"
    message = rf"metric {name} lacks its network: put {TO_FETCH[name]}.* into {metrics_home}, {go_without}"
    with pytest.raises(FileNotFoundError, match=message):
        build_metrics(["psnr", name])


def test_without_a_home_the_message_names_the_variable(metrics_home, monkeypatch):
    monkeypatch.delenv("ICD_METRICS_HOME")
    with pytest.raises(FileNotFoundError, match="a folder named by ICD_METRICS_HOME"):
        build_metrics(["lpips"])


@pytest.mark.parametrize(("name", "url"), [("lpips", LPIPS_TRUNKS["vgg"]), ("fid", INCEPTION_URL)])
def test_a_file_that_is_not_what_its_name_says_is_refused(metrics_home, name, url):
    (metrics_home / url.rsplit("/", 1)[1]).write_bytes(b"another network")
    with pytest.raises(ValueError, match="is damaged or not what its name says"):
        build_metrics([name])


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut short"])
def test_a_file_of_weights_that_was_cut_short_is_to_be_fetched_again(tmp_path, content):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"net.pt cannot be read as a file of weights \(.*\): fetch it again"):
        pretrained.load_weights(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.zeros(2)], "holds something else than one network's state dict"),
        ({"state_dict": {"weight": torch.zeros(2)}}, "holds something else than one network's state dict"),
        ({"weight": torch.tensor([1.0, torch.nan])}, "weight is not finite"),
    ],
)
def test_a_file_of_anything_but_finite_weights_is_refused_by_name(tmp_path, content, told):
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=f"net.pt.*{told}.*: fetch it again"):
        pretrained.load_weights(tmp_path / "net.pt")


def test_torch_hub_s_cache_is_looked_into_after_home(metrics_home):
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    cache = metrics_home.parent / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / name).write_bytes(content)
    assert pretrained.find_file(f"https://host/{name}") == cache / name
    (metrics_home / name).write_bytes(content)
    assert pretrained.find_file(f"https://host/{name}") == metrics_home / name


def test_the_hub_s_cache_is_looked_into_after_home(metrics_home):
    repository = metrics_home.parent / "hub" / "models--facebook--dino-vitb8"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "image_size": 32}
    for layers, folder in ((1, repository / "snapshots" / "0123"), (2, metrics_home / "dino-vitb8")):
        ViTModel(ViTConfig(**sizes, num_hidden_layers=layers)).save_pretrained(folder)
        assert len(pretrained.load_network(DINO).layers) == layers


def test_a_folder_that_lacks_weights_is_refused_and_a_whole_one_shared(metrics_home):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "image_size": 32}
    folder = metrics_home / "dino-vitb8"
    ViTModel(ViTConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)
    ViTConfig(**sizes, num_hidden_layers=2).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"dino-vitb8 lacks \d+ weights, e.g. .*: fetch it again"):
        pretrained.load_network(DINO)
    ViTModel(ViTConfig(**sizes, num_hidden_layers=2)).half().save_pretrained(folder)
    first = pretrained.load_network(DINO)
    assert pretrained.load_network(DINO) is first
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in first.parameters())
