"""SD3 goes the whole way, and plain diffusers runs what comes out."""

import json
import shutil
from functools import partial
from math import exp
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import save_file
from sd3_case import write_sd3
from training_case import Losses, scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.export import ExportWeights
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.models.backbones import SD3
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

BACKBONE = SD3()
W = 3.0


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 8)


@pytest.fixture(scope="module")
def family(tmp_path_factory, scenes) -> Family:
    """Random weights, and what a few steps of stage 1 make of them."""
    folder = write_sd3(tmp_path_factory.mktemp("sd3"))
    family = Family(str(folder), backbone=BACKBONE)
    task = GuidanceDistillation(family, (1.0, W), optimizer=OptimizerSettings(lr=1e-3, warmup_steps=0))
    trainer_for(folder, max_steps=2, callbacks=[ExportWeights()]).fit(task, datamodule=scenes_data(scenes))
    return family


@pytest.fixture
def told(family):
    """x, t and prompts for a network."""
    torch.manual_seed(1)
    return torch.randn(2, 16, 8, 8), torch.tensor([259, 999]), family.load_conditioner()(["a red star", "a ring"])


@torch.no_grad()
def test_a_guidance_embedding_begins_as_nothing_and_is_then_told_w(family, told):
    plain, guided = family.load_model(guided=False), family.load_model(guided=True)
    begun = plain.with_guidance_embedding()
    torch.testing.assert_close(begun.predict(*told, torch.full((2,), 7.0)), plain.predict(*told, None))
    assert guided.takes_guidance
    outputs = [guided.predict(*told, torch.full((2,), w)) for w in (1.0, W)]
    assert not torch.allclose(*outputs, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("w", [1.0, W])
def test_a_guidance_embedding_folds_into_a_bias(family, told, w):
    guided = family.load_model(guided=True)
    folded = DiffusionModel(BACKBONE.fold_guidance_embedding(guided.network, w), guided.process, BACKBONE)
    assert folded.network.config.pooled_projection_dim == 32
    assert not folded.takes_guidance
    torch.testing.assert_close(folded.predict(*told, None), guided.predict(*told, torch.full((2,), w)))


@torch.no_grad()
def test_a_guided_network_loads_back_from_a_folder_and_from_a_file(family, told, tmp_path):
    guided = family.load_model(guided=True)
    guided.network.save_pretrained(tmp_path / "transformer_guided")
    save_file(guided.network.state_dict(), tmp_path / "file.safetensors")
    expected = guided.predict(*told, torch.full((2,), W))
    for name in ("transformer_guided", "file.safetensors"):
        again = Family(family.model, guided_unet=str(tmp_path / name), backbone=BACKBONE).load_model(guided=True)
        assert torch.equal(again.predict(*told, torch.full((2,), W)), expected)
    plain = family.load_model(guided=False).network
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"no guidance embedding in time_text_embed.text_embedder.linear_1.weight"):
        Family(family.model, guided_unet=str(tmp_path / "plain.safetensors"), backbone=BACKBONE).load_model(guided=True)


def test_sides_that_are_not_whole_patches_are_refused(family, told):
    with pytest.raises(ValueError, match="latents of 8 x 7: this network takes sides that are multiples of 2"):
        family.load_model(guided=False).predict(told[0][..., :7], *told[1:], None)


def stage_two(family: Family) -> InvertibleConsistencyDistillation:
    torch.manual_seed(0)
    students = partial(LoraStudents, lora=LoraSettings(rank=2, alpha=4), gradient_checkpointing=True)
    optimizer = OptimizerSettings(lr=1e-2, warmup_steps=0)
    return InvertibleConsistencyDistillation(family, students=students, guidance_scales=(1.0, W), optimizer=optimizer)


def test_students_are_trained_resumed_exported_and_run_in_plain_diffusers(family, scenes, told, tmp_path):
    whole, first, second = Losses(), Losses(), Losses()
    data = partial(scenes_data, scenes)
    trainer_for(tmp_path / "whole", max_steps=3, callbacks=[whole, ExportWeights()]).fit(stage_two(family), data())
    trainer = trainer_for(tmp_path, max_steps=2, callbacks=[first], enable_checkpointing=True)
    trainer.fit(stage_two(family), data())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    again = trainer_for(tmp_path, max_steps=3, callbacks=[second])
    again.fit(stage_two(family), data(), ckpt_path=tmp_path / "two.ckpt")
    assert first.values + second.values == pytest.approx(whole.values, rel=1e-4)

    pipe = InvertibleConsistencyPipeline.from_pretrained(
        family, **{direction: str(tmp_path / "whole" / direction) for direction in DIRECTIONS}
    )
    noise = pipe.invert(torch.rand(1, 3, 64, 64), "a star", seed=0)
    edited = pipe.edit(torch.rand(1, 3, 64, 64), "a star", "a red star", seed=0, output_type="pt").images
    picture = pipe("a red star", latents=noise, output_type="pt").images
    pipe.save_pretrained(tmp_path / "saved")
    again = InvertibleConsistencyPipeline.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(again("a red star", latents=noise, output_type="pt").images, picture)
    assert (edited.shape, pipe.nfe) == ((1, 3, 64, 64), 4)

    guided = family.load_model(guided=True)
    folded = BACKBONE.fold_guidance_embedding(guided.network, W)
    students = LoraStudents(guided, lora=LoraSettings(rank=2, alpha=4))
    with torch.no_grad():
        teacher = students.predict("teacher", *told, torch.full((2,), W))
    for direction in DIRECTIONS:
        transformer = BACKBONE.with_weights(folded, folded.state_dict())
        pipeline = StableDiffusion3Pipeline.from_pretrained(family.model, transformer=transformer)
        pipeline.load_lora_weights(tmp_path / "whole" / direction)
        x, t, conditioning = told
        with torch.no_grad():
            theirs = pipeline.transformer(
                x,
                conditioning.tensors["prompt_embeds"],
                conditioning.tensors["pooled_prompt_embeds"],
                guided.process.network_time(t),
                return_dict=False,
            )[0]
            students.load(direction, StudentFile.read(tmp_path / "whole" / direction))
            torch.testing.assert_close(theirs, students.predict(direction, *told, torch.full((2,), W)))
        assert not torch.allclose(theirs, teacher, atol=1e-4)


def test_a_shift_by_resolution_is_fixed_for_a_training_and_students_tell_it(family, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family.model, folder, ignore=shutil.ignore_patterns("forward", "reverse", "kohya"))
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "use_dynamic_shifting": True}))
    # diffusers: mu is 0.5 at 256 tokens and 1.15 at 4096; of 64 and 512 pixels there are 16 and 1024
    for trained_at, mu in ((None, 0.4594), (512, 0.63)):
        there = Family(str(folder), backbone=BACKBONE, trained_at=trained_at)
        assert there.load_process().settings["shift"] == pytest.approx(exp(mu), rel=1e-4)
    students = LoraStudents(there.load_model(guided=True), lora=LoraSettings(rank=2))
    students.export("forward", tmp_path, {})
    students.load("forward", StudentFile.read(tmp_path / "forward"))
    other = LoraStudents(Family(str(folder), backbone=BACKBONE).load_model(guided=True), lora=LoraSettings(rank=2))
    with pytest.raises(ValueError, match=r"trained for the process \{'shift': 1.87.*name it by --trained_at"):
        other.load("forward", StudentFile.read(tmp_path / "forward"))
    with pytest.raises(ValueError, match="trained_at -1 is no side of pictures, in pixels"):
        Family(str(folder), trained_at=-1)


@pytest.mark.parametrize(
    "name", ["stable-diffusion-3.5-large-turbo", "FLUX.2-klein-4B", "FLUX.2-klein-base-4B", "z-image-turbo"]
)
def test_a_distribution_matched_model_is_refused_by_its_name_and_before_it_is_looked_for(family, tmp_path, name):
    (tmp_path / name).symlink_to(family.model)
    if "base" in name:
        Family(str(tmp_path / name)).check()
        return
    for model in (str(tmp_path / name), f"someone/{name}"):
        with pytest.raises(ValueError, match=rf"few steps of {model} match a distribution and follow no probability"):
            Family(model).check()


def test_a_model_that_says_that_it_is_distilled_is_refused(family, tmp_path):
    shutil.copytree(family.model, tmp_path / "model", symlinks=True)
    index = tmp_path / "model" / "model_index.json"  # as FLUX.2-klein's
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    with pytest.raises(ValueError, match=r"follow no probability flow: .*take the model that it was made of"):
        Family(str(tmp_path / "model")).load_model(guided=False)
