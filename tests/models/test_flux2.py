"""FLUX.2-klein-base beside diffusers' own pipeline, and the whole way to students that diffusers loads."""

from itertools import pairwise
from math import exp
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from modern_case import flux2_pipeline, stage_one, stage_two, write
from torch import nn
from training_case import write_scenes

from icd_lightning.diffusion import Boundaries, DDIMJump, Flow
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.models.autoencoder import LatentAutoencoder
from icd_lightning.models.backbones import Flux2
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

PROMPTS = ["a red star", "a green ring"]
START, END = (torch.full((2,), t) for t in (999, 0))
LENGTH, W = 64, 3.0


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture(scope="module")
def family(tmp_path_factory, scenes) -> Family:
    return stage_one(flux2_pipeline(), tmp_path_factory.mktemp("flux2"), scenes, backbone=Flux2(LENGTH), trained_at=32)


def noise(columns: int = 4) -> torch.Tensor:
    return torch.randn(2, 16, 8, columns, generator=torch.Generator().manual_seed(1))


def sampled(pipe: Flux2Pipeline | Flux2KleinPipeline, x: torch.Tensor, **options: object) -> torch.Tensor:
    """Pictures from noise by diffusers' pipeline, in one step where nothing is said."""
    pipe.set_progress_bar_config(disable=True)
    sides = {"height": 4 * x.shape[2], "width": 4 * x.shape[3]}
    options = {"num_inference_steps": 1, "output_type": "pt", "max_sequence_length": LENGTH, **sides, **options}
    return pipe(latents=x, **options).images


def pictures(family: Family, latents: torch.Tensor) -> torch.Tensor:
    """In [0, 1]."""
    return family.load_autoencoder().decode(latents) / 2 + 0.5


@torch.no_grad()
@pytest.mark.parametrize("w", [1.0, W])
def test_a_jump_from_noise_is_a_step_of_diffusers_pipeline(family, w):
    prompts = family.load_conditioner()
    denoise = family.load_model(guided=False).denoiser(prompts(PROMPTS), w, prompts.unconditional(2))
    ours = DDIMJump(denoise, denoise.process)(noise(), START, END)
    expected = sampled(Flux2KleinPipeline.from_pretrained(family.model), noise(), prompt=PROMPTS, guidance_scale=w)
    torch.testing.assert_close(pictures(family, ours), expected)


@torch.no_grad()
def test_the_solvers_steps_are_those_of_diffusers_pipeline(family):
    """The shift depends on resolution and on the number of steps, in diffusers; here it is that of the solver's."""
    process, prompts = family.load_process(), family.load_conditioner()
    denoise = family.load_model(guided=False).denoiser(prompts(PROMPTS), 1.0, prompts.unconditional(2))
    x = noise(8)
    for t, s in pairwise([*range(999, 0, -20), 0]):
        x = DDIMJump(denoise, process)(x, *(torch.full((2,), time) for time in (t, s)))
    pipe = Flux2KleinPipeline.from_pretrained(family.model)
    expected = sampled(pipe, noise(8), prompt=PROMPTS, guidance_scale=1.0, num_inference_steps=50)
    torch.testing.assert_close(pictures(family, x), expected, rtol=1e-4, atol=1e-4)
    assert process.settings["shift"] != Family(family.model).load_process().settings["shift"]  # of 64 pixels


@torch.no_grad()
def test_latents_are_those_that_the_network_sees(family):
    images = torch.rand(2, 3, 16, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    autoencoder, pipe = family.load_autoencoder(), Flux2KleinPipeline.from_pretrained(family.model)
    latents = autoencoder.encode(images)
    assert latents.shape == (2, autoencoder.latent_channels, 16 // autoencoder.downsampling, 8)
    torch.testing.assert_close(latents, pipe._encode_vae_image(images, torch.Generator()))
    drawn = autoencoder.sample(autoencoder.moments(images), normal=torch.ones)
    assert drawn.shape == latents.shape
    assert not torch.allclose(drawn, latents)
    for wrong in (-1.0, torch.nan):
        autoencoder.vae.bn.running_var[0] = wrong
        with pytest.raises(ValueError, match="running_var of the autoencoder's bn is nothing to scale latents with"):
            LatentAutoencoder(autoencoder.vae)


@torch.no_grad()
def test_a_guidance_embedding_begins_as_nothing_and_is_then_told_w(family):
    plain, guided = family.load_model(guided=False), family.load_model(guided=True)
    told = noise(), torch.tensor([259, 999]), family.load_conditioner()(PROMPTS)
    assert not plain.takes_guidance
    begun = plain.with_guidance_embedding()
    torch.testing.assert_close(begun.predict(*told, torch.full((2,), 7.0)), plain.predict(*told, None))
    assert not torch.allclose(*(guided.predict(*told, torch.full((2,), w)) for w in (1.0, W)), atol=1e-4)


def test_students_are_trained_by_the_configuration_and_run_in_plain_diffusers(family, scenes, tmp_path):
    stage_two("flux2_klein", family, scenes, tmp_path)
    prompts = family.load_conditioner()
    files = [StudentFile.read(tmp_path / direction) for direction in DIRECTIONS]
    lora = LoraSettings(files[0].rank, files[0].alpha)
    students = LoraStudents(family.load_model(guided=True), lora=lora, **{d: str(tmp_path / d) for d in DIRECTIONS})
    assert files[0].about["process"] == family.load_process().settings
    for direction in DIRECTIONS:
        # the pipeline of klein tells no w, that of FLUX.2-dev does
        pipe = Flux2KleinPipeline.from_pretrained(family.model, transformer=family.load_model(guided=True).network)
        embeds = pipe.encode_prompt(PROMPTS, max_sequence_length=LENGTH)[0]
        told = {"text_encoder": None, "tokenizer": None, "transformer": pipe.transformer}
        pipe = Flux2Pipeline(pipe.scheduler, pipe.vae, **told)
        before = sampled(pipe, noise(), prompt_embeds=embeds, guidance_scale=W)
        pipe.load_lora_weights(tmp_path / direction)
        with torch.no_grad():
            ours = pictures(family, students.jump(direction, prompts(PROMPTS), W)(noise(), START, END))
        torch.testing.assert_close(ours, sampled(pipe, noise(), prompt_embeds=embeds, guidance_scale=W))
        assert not torch.allclose(ours, before, atol=1e-3)

    pipe = InvertibleConsistencyPipeline.from_pretrained(family, **{d: str(tmp_path / d) for d in DIRECTIONS})
    told = torch.rand(1, 3, 32, 32), "a star", "a red star"
    edited, borrowing = (
        pipe.edit(*told, control=control, seed=0, output_type="pt").images for control in (None, Injection(inject=1.0))
    )
    pipe.save_pretrained(tmp_path / "saved")
    again = InvertibleConsistencyPipeline.from_pretrained(Family(str(tmp_path / "saved"), backbone=Flux2(LENGTH)))
    x = noise()[:1]
    picture = pipe("a red star", latents=x, output_type="pt").images
    torch.testing.assert_close(again("a red star", latents=x, output_type="pt").images, picture)
    assert edited.shape == (1, 3, 32, 32)
    assert not torch.equal(edited, borrowing)


def test_students_adapt_every_layer_of_the_blocks_and_what_modulates_them():
    network = flux2_pipeline(guidance_embeds=True).transformer
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    students = LoraStudents(DiffusionModel(network, Flow(), Flux2()))
    ends = {name for name in layers if name.split(".")[0] in ("x_embedder", "context_embedder", "proj_out")}
    others = {name for name in layers if name.startswith(("time_guidance_embed", "norm_out"))}
    assert students.layers_of("forward").keys() == layers - ends - others


def test_flux2_dev_is_refused_for_its_text_encoder(tmp_path):
    write(flux2_pipeline(joint_attention_dim=15360), tmp_path, 16)
    for load in (Family(str(tmp_path)).check, lambda: Family(str(tmp_path)).load_model(guided=False)):
        with pytest.raises(ValueError, match=r"shape of FLUX\.2-dev, .* Mistral.*: take FLUX\.2-klein-base-4B"):
            load()


def test_kleins_flow_is_shifted_by_the_size_it_is_trained_at_and_the_solvers_steps():
    for trained_at, tokens in ((None, 4096), (512, 1024)):
        shift = Family("random:flux2_klein", trained_at=trained_at).load_process().settings["shift"]
        assert shift == pytest.approx(exp(compute_empirical_mu(tokens, Boundaries((999,)).num_solver_steps)))
