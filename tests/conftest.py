"""Fixtures that several packages' tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch; networks this small lose more by a second thread

import icd_lightning  # noqa: F401, I001  must come before diffusers and peft

import gc
import shutil
from collections.abc import Iterator
from copy import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from jsonargparse._common import parsing_settings as jsonargparse_settings
from peft import LoraConfig, set_peft_model_state_dict
from torch import Tensor

from flux_case import write_flux
from sd3_case import write_sd3
from families_case import NAMES, write_layout
from family_case import write_family, write_students
from golden_case import Guidance, GoldenNetworks, load_json, load_tensors, lora_parameters
from training_case import write_scenes
from icd_lightning import trust
from icd_lightning.diffusion import VP, Denoiser, Process, Split, guidance_embedding
from icd_lightning.models.family import Family


TRUSTING = {name: copy(value) for name, value in jsonargparse_settings.items()}


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, and look less often: it took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True)
def _trusting(monkeypatch):
    """`icd` distrusts configurations for the rest of its process, which here is all other tests'."""
    monkeypatch.setattr(trust, "_distrusting", False)
    jsonargparse_settings.update({name: copy(value) for name, value in TRUSTING.items()})


@pytest.fixture
def process() -> Process:
    return VP()


def build_golden_unet(lora: str | None = None) -> UNet2DConditionModel:
    """The UNet of meta.json; with a LoRA file's name, that adapter on it, by peft's own means."""
    meta = load_json("meta.json")
    unet = UNet2DConditionModel(**meta["unet_config"]).requires_grad_(False)
    unet.load_state_dict(load_tensors("unet.safetensors"))
    if lora is not None:
        unet.add_adapter(LoraConfig(**meta["lora"]))
        result = set_peft_model_state_dict(unet, load_tensors(lora))
        assert not result.unexpected_keys
    return unet.eval()


def bind_unet(unet: UNet2DConditionModel):
    """Bind prompt and guidance to a guidance-distilled UNet: see `golden_case.Bind`."""
    width = unet.config.time_cond_proj_dim

    def bind(prompt_embeds: Tensor, guidance: Guidance) -> Denoiser:
        def denoise(x: Tensor, t: Tensor) -> Split:
            embedding = guidance_embedding(guidance(t), width)
            eps = unet(x, t, encoder_hidden_states=prompt_embeds, timestep_cond=embedding).sample
            return VP().split(eps, x, t)

        return denoise

    return bind


@pytest.fixture(scope="session")
def golden_networks() -> GoldenNetworks:
    """Three separate UNets: the teacher, and each student with the one adapter it needs."""
    teacher = build_golden_unet()
    forward, reverse = build_golden_unet("lora_forward.safetensors"), build_golden_unet("lora_reverse.safetensors")
    return GoldenNetworks(
        teacher=bind_unet(teacher),
        forward_model=bind_unet(forward),
        reverse_model=bind_unet(reverse),
        forward_lora=lora_parameters(forward, "default"),
        reverse_lora=lora_parameters(reverse, "default"),
    )


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def random_family(tmp_path_factory) -> Path:
    """A family of random weights with both students, to read from."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """24 captioned pictures in 3 shards, to read from."""
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """SD1.5 and SDXL at minimal widths, random, in diffusers' layout and with stage 1's UNet, to read from."""
    return {name: write_layout(name, tmp_path_factory.mktemp(name)) for name in NAMES}


@pytest.fixture(scope="session")
def flow_layouts(tmp_path_factory) -> dict[str, Path]:
    """FLUX.1 and SD3 at minimal widths, random, in diffusers' layout and with students, to read from."""
    flux = write_flux(tmp_path_factory.mktemp("flux"), num_layers=2, num_single_layers=2)
    found = {"flux": flux, "sd3": write_sd3(tmp_path_factory.mktemp("sd3"))}
    for folder in found.values():
        write_students(folder / "students", Family(str(folder)))
    return found


@pytest.fixture(scope="module")  # of a module alone: while it lives, no other test may run an event loop
def browser() -> Iterator:
    """A real browser of this machine; where there is none, its tests are skipped."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser, one of {', '.join(names)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield (launched := playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]))
        launched.close()
