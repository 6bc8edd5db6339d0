"""The registry, and where pretrained networks come from: the real ones or none."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from icd_lightning.metrics import pretrained
from icd_lightning.metrics.inception import INCEPTION_URL
from icd_lightning.metrics.perceptual import DINO, LPIPS_TRUNKS
from icd_lightning.metrics.registry import METRICS, PRESETS, build_metrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
TO_FETCH = {
    "lpips": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "lpips-squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
    "fid": "https://.*/pt_inception-2015-12-05-6726825d.pth",
    "fid-clean": "https://.*/pt_inception-2015-12-05-6726825d.pth",
    "dinov2": r"facebook/dinov2-base \(hf download",
    "structure-distance": r"facebook/dino-vitb8 \(hf download",
    "clip-t": r"openai/clip-vit-large-patch14 \(hf download",
    "clip-i": r"openai/clip-vit-large-patch14 \(hf download",
    "clip-score": r"openai/clip-vit-large-patch14 \(hf download",
    "image-reward": r"THUDM/ImageReward \(hf download THUDM/ImageReward ImageReward.pt\)",
}


@pytest.mark.parametrize("name", TO_FETCH)
def test_a_missing_network_ends_early_with_what_to_fetch_and_how_to_go_without(metrics_home, name):
    go_without = r"or go without, e\.g\. metrics: \[psnr"
    message = rf"metric {name} lacks its network: put {TO_FETCH[name]}.* into {metrics_home}, {go_without}"
    with pytest.raises(FileNotFoundError, match=message):
        build_metrics(["psnr", name])


def test_all_others_come_with_the_package(metrics_home):
    names = METRICS.keys() - TO_FETCH.keys()
    assert build_metrics(sorted(names)).keys() == names


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
    with pytest.raises(ValueError, match=r"net.pt cannot be read as weights \(.*\): fetch it again"):
        pretrained.load_weights(tmp_path / "net.pt")


def test_torch_hub_s_cache_is_looked_into_after_home(metrics_home):
    content = b"weights"
    name = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    cache = metrics_home.parent / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / name).write_bytes(content)
    assert pretrained.find_file(f"https://host/{name}", "lpips") == cache / name
    (metrics_home / name).write_bytes(content)
    assert pretrained.find_file(f"https://host/{name}", "lpips") == metrics_home / name


def test_a_folder_that_lacks_weights_is_refused_and_a_whole_one_shared(metrics_home):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "image_size": 32}
    folder = metrics_home / "dino-vitb8"
    ViTModel(ViTConfig(**sizes, num_hidden_layers=1)).save_pretrained(folder)
    ViTConfig(**sizes, num_hidden_layers=2).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"dino-vitb8 lacks \d+ weights, e.g. .*: fetch it again"):
        pretrained.load_network("structure-distance", DINO, ViTModel)
    ViTModel(ViTConfig(**sizes, num_hidden_layers=2)).half().save_pretrained(folder)
    first = pretrained.load_network("structure-distance", DINO, ViTModel)
    assert pretrained.load_network("structure-distance", DINO, ViTModel) is first
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in first.parameters())


# Names


def test_unknown_names_are_refused_before_anything_is_loaded(metrics_home):
    with pytest.raises(ValueError, match=r"no metric 'psnrr'; there is: psnr, ssim, .*one of icd, piebench, tiny"):
        build_metrics(["lpips", "psnrr"])
    for name in ("tiny-fd-edited", "latent-nll-unedited"):
        with pytest.raises(ValueError, match="is not of single pictures, and so not of parts"):
            build_metrics([name])


def test_a_preset_stands_for_its_metrics_and_a_name_is_built_once():
    assert tuple(build_metrics(["tiny", "psnr", "mse"])) == (*PRESETS["tiny"], "mse")


def test_building_draws_no_random_numbers():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    build_metrics(["tiny"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_registry_is_light_to_import():
    heavy = "{'torch', 'torchmetrics', 'transformers'}"
    code = f"import sys, icd_lightning.metrics.registry; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_every_metric_and_preset_is_documented():
    text = DOCS.read_text()
    assert all(f"`{name}`" in text for name in (*METRICS, *PRESETS))
