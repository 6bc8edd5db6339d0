"""Z-Image beside diffusers' own pipeline, and the whole way to students that diffusers loads."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from modern_case import stage_one, stage_two, z_image_pipeline
from torch import nn
from training_case import write_scenes

from icd_lightning.diffusion import DDIMJump, Flow
from icd_lightning.editing.limits import Injection, PromptToPrompt
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.models.backbones import ZImage
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

LENGTH, W = 96, 3.0
BACKBONE = ZImage(LENGTH)
PROMPTS = ["a red star", "a large green ring left of a small blue circle"]  # 37 and 73 tokens: 64 and 96 in the network
START, END = (torch.full((2,), t) for t in (999, 0))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture(scope="module")
def family(tmp_path_factory, scenes) -> Family:
    return stage_one(z_image_pipeline(), tmp_path_factory.mktemp("z_image"), scenes, backbone=BACKBONE)


def noise() -> torch.Tensor:
    return torch.randn(2, 16, 8, 4, generator=torch.Generator().manual_seed(1))


def sampled(pipe: ZImagePipeline, w: float, steps: int = 1) -> torch.Tensor:
    """Latents from noise by diffusers' pipeline, which counts guidance from 0."""
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 16, "width": 8, "max_sequence_length": LENGTH, "output_type": "latent"}
    return pipe([*PROMPTS], latents=noise(), guidance_scale=w - 1, num_inference_steps=steps, **options).images


@torch.no_grad()
@pytest.mark.parametrize(("w", "steps"), [(1.0, 1), (W, 1), (1.0, 10)])
def test_jumps_from_noise_are_steps_of_diffusers_pipeline(family, w, steps):
    prompts = family.load_conditioner()
    denoise = family.load_model(guided=False).denoiser(prompts(PROMPTS), w, prompts.unconditional(2))
    x = noise()
    for t, s in pairwise([*range(999, 0, -1000 // steps), 0]):
        x = DDIMJump(denoise, denoise.process)(x, *(torch.full((2,), time) for time in (t, s)))
    expected = sampled(ZImagePipeline.from_pretrained(family.model), w, steps)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_prompt_is_read_the_same_beside_a_longer_one(family):
    model, prompts = family.load_model(guided=False), family.load_conditioner()(PROMPTS)
    whole = model.predict(noise(), START, prompts, None)
    for i in range(2):
        alone = model.predict(noise()[i : i + 1], START[:1], prompts[i], None)
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)


def test_sides_that_are_not_whole_patches_are_refused(family):
    with pytest.raises(ValueError, match="latents of 8 x 3: this network takes sides that are multiples of 2"):
        family.load_model(guided=False).predict(noise()[..., :3], START, family.load_conditioner()(PROMPTS), None)


@torch.no_grad()
def test_a_guidance_embedding_begins_as_nothing_is_then_told_w_and_folds_into_a_bias(family):
    plain, guided = family.load_model(guided=False), family.load_model(guided=True)
    told = noise(), torch.tensor([259, 999]), family.load_conditioner()(PROMPTS)
    begun = plain.with_guidance_embedding()
    torch.testing.assert_close(begun.predict(*told, torch.full((2,), 7.0)), plain.predict(*told, None))
    assert not torch.allclose(*(guided.predict(*told, torch.full((2,), w)) for w in (1.0, W)), atol=1e-3)
    for w in (1.0, W):
        folded = DiffusionModel(BACKBONE.fold_guidance_embedding(guided.network, w), guided.process, BACKBONE)
        assert not folded.takes_guidance
        torch.testing.assert_close(folded.predict(*told, None), guided.predict(*told, torch.full((2,), w)))


def test_students_are_trained_by_the_configuration_and_run_in_the_plain_pipeline(family, scenes, tmp_path):
    stage_two("z_image", family, scenes, tmp_path)
    files = {direction: str(tmp_path / direction) for direction in DIRECTIONS}
    read = StudentFile.read(tmp_path / "forward")
    guided, prompts = family.load_model(guided=True), family.load_conditioner()(PROMPTS)
    folded = BACKBONE.fold_guidance_embedding(guided.network, W)
    students = LoraStudents(guided, lora=LoraSettings(read.rank, read.alpha), **files)
    for direction in DIRECTIONS:
        plain = BACKBONE.with_weights(folded, folded.state_dict())
        pipe = ZImagePipeline.from_pretrained(family.model, transformer=plain)
        before = sampled(pipe, 1.0)
        pipe.load_lora_weights(tmp_path / direction)
        with torch.no_grad():
            ours = students.jump(direction, prompts, W)(noise(), START, END)
        torch.testing.assert_close(ours, sampled(pipe, 1.0), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, before, atol=1e-2)

    pipe = InvertibleConsistencyPipeline.from_pretrained(family, **files)
    edited = pipe.edit(torch.rand(1, 3, 32, 32), "a star", "a red star", seed=0, output_type="pt").images
    for control in (Injection(), PromptToPrompt()):  # text and picture attend together there, by the same projections
        with pytest.raises(ValueError, match=r"else swap the prompt \(icd_swap\)"):
            pipe.edit(torch.rand(1, 3, 32, 32), "a star", "a red star", control=control)
    pipe.save_pretrained(tmp_path / "saved")
    again = InvertibleConsistencyPipeline.from_pretrained(Family(str(tmp_path / "saved"), backbone=BACKBONE))
    picture = pipe("a red star", latents=noise()[:1], output_type="pt").images
    torch.testing.assert_close(again("a red star", latents=noise()[:1], output_type="pt").images, picture)
    assert edited.shape == (1, 3, 32, 32)


def test_students_adapt_every_layer_of_the_blocks():
    network = z_image_pipeline().transformer
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    students = LoraStudents(DiffusionModel(network, Flow(), ZImage()).with_guidance_embedding())
    blocks = tuple(name for name in layers if name.startswith(("layers.", "noise_refiner.", "context_refiner.")))
    assert students.layers_of("forward").keys() == set(blocks)
