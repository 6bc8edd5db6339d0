"""FLUX beside diffusers' own pipeline: the same velocity, also by a student's file; which networks are teachers."""

import json
from math import exp
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from family_case import write_students
from flux_case import TRANSFORMER, flux_pipeline, write_flux
from training_case import distillation, same, scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.export import ExportWeights
from icd_lightning.diffusion import DDIMJump
from icd_lightning.models.backbones import Flux
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS
from icd_lightning.models.text import PooledConditioner

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

PROMPTS = ["a red star", "a large green ring left of a small blue circle"]
START, END = (torch.full((2,), t) for t in (999, 0))


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Family:
    return Family(str(write_flux(tmp_path_factory.mktemp("flux"))))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 4)


def noise() -> torch.Tensor:
    return torch.randn(2, 16, 8, 4, generator=torch.Generator().manual_seed(1))


def by_diffusers(pipe: FluxPipeline, x: torch.Tensor, w: float) -> torch.Tensor:
    """Latents from noise in one step of diffusers' pipeline."""
    packed = pipe._pack_latents(x, *x.shape)
    sides = {"height": x.shape[2] * pipe.vae_scale_factor, "width": x.shape[3] * pipe.vae_scale_factor}
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": w, "latents": packed, "output_type": "latent"}
    return pipe._unpack_latents(pipe(PROMPTS, **sides, **options).images, *sides.values(), pipe.vae_scale_factor)


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_a_jump_from_noise_is_a_step_of_diffusers_pipeline(flux, w):
    denoise = flux.load_model(guided=True).denoiser(flux.load_conditioner()(PROMPTS), w)
    with torch.no_grad():
        ours = DDIMJump(denoise, denoise.process)(noise(), START, END)
    torch.testing.assert_close(ours, by_diffusers(FluxPipeline.from_pretrained(flux.model), noise(), w))


def test_the_network_is_told_the_noise_level_as_diffusers_counts_it(flux):
    model, told = flux.load_model(guided=True), []
    model.network.register_forward_pre_hook(lambda network, args, kwargs: told.append(args[3]), with_kwargs=True)
    t = torch.tensor([19, 499])
    model.predict(noise(), t, flux.load_conditioner()(PROMPTS), torch.ones(2))
    torch.testing.assert_close(told[0], model.process.sigmas[t])  # its pipeline: timestep / 1000


def test_it_trains_resumes_and_exports_for_diffusers_without_stage_one(flux, scenes, tmp_path):
    write_students(Path(flux.model, "students"), flux)  # far from the teacher, so that what is loaded shows
    for steps, last in ((1, None), (2, tmp_path / "last.ckpt")):
        trainer = trainer_for(tmp_path, max_steps=steps, callbacks=[ExportWeights()])
        task = distillation(Path(flux.model))
        task.students.network.enable_gradient_checkpointing(task.students._checkpointed)
        trainer.fit(task, datamodule=scenes_data(scenes), ckpt_path=last)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.global_step == 2
    conditioning = flux.load_conditioner()(PROMPTS)
    for direction in DIRECTIONS:
        assert StudentFile.read(tmp_path / direction).part == "transformer"
        pipe = FluxPipeline.from_pretrained(flux.model)
        before = by_diffusers(pipe, noise(), 3.0)
        pipe.load_lora_weights(tmp_path / direction)
        with torch.no_grad():
            ours = task.students.jump(direction, conditioning, 3.0)(noise(), START, END)
        torch.testing.assert_close(ours, by_diffusers(pipe, noise(), 3.0), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, before, atol=0.01)


def test_latents_of_other_sides_than_whole_patches_are_refused(flux):
    model = flux.load_model(guided=True)
    with pytest.raises(ValueError, match=r"latents of 8 x 5: .* multiples of 2"):
        model.predict(torch.zeros(2, 16, 8, 5), START, flux.load_conditioner()(PROMPTS), torch.ones(2))


@pytest.mark.parametrize(("channels", "taken"), [(16, 16), (64, 16), (384, 24), (128, 32), (4, 4)])
def test_channels_of_latents_and_of_what_is_more_than_latents(channels, taken):
    """FLUX.1-Fill takes 384, FLUX.1-Depth 128."""
    network = flux_pipeline(in_channels=channels).transformer
    assert Flux().latent_channels(network) == taken


def test_a_network_without_w_gets_an_embedding_that_says_nothing_at_first(flux):
    plain = DiffusionModel(flux_pipeline(guidance_embeds=False).transformer, flux.load_process(), Flux())
    guided = plain.with_guidance_embedding()
    told = noise(), torch.tensor([19, 499]), flux.load_conditioner()(PROMPTS)
    with torch.no_grad():
        expected = plain.predict(*told, None)
        for w in (1.0, 5.0):
            torch.testing.assert_close(guided.predict(*told, torch.full((2,), w)), expected)
    out = guided.predict(*told, torch.ones(2)).square().sum()
    out.backward()
    assert guided.network.time_text_embed.guidance_embedder.linear_2.weight.grad.abs().sum() > 0


def test_of_a_network_without_w_stage_one_is_asked_for(tmp_path):
    family = Family(str(write_flux(tmp_path, guidance_embeds=False)))
    assert not family.load_model(guided=False).takes_guidance
    with pytest.raises(FileNotFoundError, match=r"no guidance-distilled transformer \(stage 1\)"):
        family.check()


def test_schnell_is_no_teacher(tmp_path):
    config = {**TRANSFORMER, "num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(
        json.dumps(config | {"_class_name": "FluxTransformer2DModel"})
    )
    family = Family(str(tmp_path))
    for load in (family.check, lambda: family.load_model(guided=False)):
        with pytest.raises(ValueError, match=r"shape of FLUX\.1-schnell"):
            load()


def test_a_transformer_of_another_class_is_named_with_the_remedy(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"_class_name": "AuraFlowTransformer2DModel"}')
    with pytest.raises(ValueError, match=r"class 'AuraFlowTransformer2DModel'.* known: .*Flux.*family.backbone"):
        Family(str(tmp_path)).check()


def test_without_t5_the_sequence_is_clips_own(flux):
    both = flux.load_conditioner()
    alone = PooledConditioner(both.clips[0].tokenizer, both.clips[0].text_encoder)
    clip, t5 = alone(PROMPTS).tensors, both(PROMPTS).tensors
    assert torch.equal(clip["pooled_prompt_embeds"], t5["pooled_prompt_embeds"])
    assert (clip["prompt_embeds"].shape, t5["prompt_embeds"].shape) == ((2, 24, 16), (2, 512, 24))
    assert both.fingerprint != alone.fingerprint
    assert same(alone.unconditional(2).tensors, alone(["", ""]).tensors)


def test_flux_devs_flow_is_shifted_by_the_size_it_is_trained_at():
    family = Family("random:flux_dev")
    assert family.resolution == 1024
    assert family.load_process().settings["shift"] == pytest.approx(exp(1.15))
    smaller = Family("random:flux_dev", trained_at=512)
    assert smaller.load_process().settings["shift"] == pytest.approx(exp(0.63))
    family.check_side(1024)
    smaller.check_side(512)
    with pytest.raises(
        ValueError, match=r"of 512 pixels a side, random:flux_dev is of 1024: give family.trained_at 512"
    ):
        family.check_side(512)
    family.check()
