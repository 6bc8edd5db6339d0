"""An architecture from outside of the package goes the whole way: stage 1, stage 2, validation, and files."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from outside_case import TEXT_WIDTH, SmallSD3
from training_case import assert_the_same_in_diffusers, same, scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.export import ExportWeights
from icd_lightning.commands.main import main
from icd_lightning.diffusion import Flow
from icd_lightning.models.backbones import SD3, backbone_of
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

CONF = Path(__file__).parents[2] / "conf"
TRANSFORMER = {
    **{"sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2},
    **{"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH},
    **{"caption_projection_dim": 16, "pooled_projection_dim": TEXT_WIDTH, "pos_embed_max_size": 8},
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture(scope="module")
def outside(random_family, scenes, tmp_path_factory) -> Family:
    """The random family with a transformer of random weights on a flow, and what a step of stage 1 makes of it."""
    folder = tmp_path_factory.mktemp("outside") / "model"
    shutil.copytree(random_family, folder, ignore=shutil.ignore_patterns("unet*", "students"))
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.2)
    transformer.save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    family = Family(str(folder), backbone=SmallSD3())
    trainer_for(folder, max_steps=2, callbacks=[ExportWeights()]).fit(
        GuidanceDistillation(family, (1.0, 3.0)), datamodule=scenes_data(scenes)
    )
    return family


def test_stage_one_leaves_a_network_that_is_told_w(outside):
    plain, guided = (outside.load_model(guided=guided) for guided in (False, True))
    assert isinstance(guided.process, Flow)
    assert (plain.takes_guidance, guided.takes_guidance) == (False, True)
    told = torch.randn(1, 16, 8, 8), torch.tensor([500]), outside.load_conditioner()(["a red star"])
    with torch.no_grad():
        outputs = [guided.predict(*told, torch.tensor([w])) for w in (1.0, 3.0)]
        assert not torch.equal(*outputs)
        torch.testing.assert_close(outputs[0], plain.predict(*told, None), atol=0.05, rtol=0.05)


def test_a_network_that_packs_latents_says_what_they_are(outside, random_family, monkeypatch):
    """Flux, for one, takes 64 channels for latents of 16."""
    family = Family(outside.model, vae=str(random_family / "vae"), backbone=SmallSD3())
    monkeypatch.setattr(SmallSD3, "latent_channels", lambda self, network: 4 * network.config["in_channels"])
    with pytest.raises(ValueError, match=r"the transformer of .* takes 64 channels, and its latents have 16"):
        family.load_model(guided=False)


def test_stage_two_trains_validates_and_exports_it_by_class_path(outside, scenes, tmp_path):
    settings = {
        "model.init_args.family.model": outside.model,
        "model.init_args.family.backbone": "outside_case.SmallSD3",
        "model.init_args.students.init_args.gradient_checkpointing": "true",
        "model.init_args.optimizer.warmup_steps": 0,
        "data.init_args.urls": scenes,
        "data.init_args.val_urls": scenes,
        "data.init_args.batch_size": 2,
        "data.init_args.val_batch_size": 4,
        "trainer.default_root_dir": tmp_path,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
    }
    configs = [word for name in ("base", "model/tiny") for word in ("--config", str(CONF / f"{name}.yaml"))]
    main(["--trust-config", "fit", *configs, *(f"--{key}={value}" for key, value in settings.items())])

    students = LoraStudents(outside.load_model(guided=True), lora=(lora := LoraSettings(rank=16, alpha=16)))
    for direction in DIRECTIONS:
        file = StudentFile.read(tmp_path / direction)
        assert (file.part, file.direction, file.boundaries) == ("transformer", direction, [0, 259, 519, 779, 999])
        kohya = StudentFile.read(tmp_path / "kohya" / f"{direction}.safetensors")
        assert same(kohya.fitted(students.named_parameters_of(direction)), dict(file.weights))
    told = torch.randn(1, 16, 8, 8), torch.tensor([500]), outside.load_conditioner()(["a star"]), torch.tensor([3.0])
    assert_the_same_in_diffusers(outside, tmp_path, lora, *told)


def test_a_pipeline_refuses_a_network_it_does_not_know():
    """Before, it was taken for a UNet."""

    class Mine(SD3Transformer2DModel):
        pass

    assert isinstance(backbone_of(Mine(**TRANSFORMER)), SD3)
    with pytest.raises(ValueError, match="Linear is none of the networks that a pipeline knows"):
        backbone_of(torch.nn.Linear(1, 1))
