"""Trainings of a few steps: a random family, real shards of pictures, a real Trainer on the CPU."""

from functools import partial
from pathlib import Path

import icd_lightning  # noqa: F401 (before lightning: it makes a CUDA torchvision importable beside a CPU torch)

# isort: split
import lightning
import torch
from torch import Tensor

from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.shards import encode_sample, write_shards
from icd_lightning.models.family import Family
from icd_lightning.models.student_file import StudentFile
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import scene_at

FEW = partial(LoraStudents, lora=LoraSettings(rank=2, target_modules=("to_q", "conv1")))
"""`students` of `distillation`: small new adapters, for when it matters that something is trained, not what."""


def write_scenes(folder: Path, count: int = 24, *, seed: int = 0) -> Path:
    """Shards of captioned pictures, 8 in each."""
    scenes = [scene_at(seed, i) for i in range(count)]
    samples = [encode_sample(f"{i:05d}", render(s, 64), s.caption(), s.to_dict()) for i, s in enumerate(scenes)]
    write_shards(samples, folder, shard_size=8, parameters={"seed": seed})
    return folder


def scenes_data(folder: Path, **options) -> ShardDataModule:
    return ShardDataModule(str(folder), **{"batch_size": 2, "resolution": 64, "shuffle_buffer": 8, **options})


def distillation(family: Path, **options) -> InvertibleConsistencyDistillation:
    """Stage 2 from the family's students, which are far from the teacher and from each other."""
    files = {direction: str(family / "students" / direction) for direction in DIRECTIONS}
    torch.manual_seed(0)  # new adapters begin at random
    students = partial(LoraStudents, lora=LoraSettings(rank=4), **files)
    settings = {"students": students, "guidance_scales": (1.0, 3.0), "optimizer": OptimizerSettings(lr=1e-3)}
    return InvertibleConsistencyDistillation(Family(str(family)), **{**settings, **options})


def trainer_for(folder: Path, **options) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    here = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "use_distributed_sampler": False}
    return lightning.Trainer(**{**quiet, **here, "enable_checkpointing": False, **options})


class Losses(lightning.Callback):
    """Remembers each micro-batch's loss, as a number."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(outputs["loss"].item())


def student_weights(task: InvertibleConsistencyDistillation) -> dict[str, dict[str, Tensor]]:
    """A copy of each student's weights, by direction."""
    named = {direction: task.students.named_parameters_of(direction) for direction in DIRECTIONS}
    return {d: {name: p.detach().clone() for name, p in parameters.items()} for d, parameters in named.items()}


def frozen_weights(task: lightning.LightningModule) -> dict[str, Tensor]:
    """A copy of everything that must not move, buffers included."""
    trained = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    return {name: value.clone() for name, value in task.state_dict().items() if name not in trained}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether the tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@torch.no_grad()
def assert_the_same_in_diffusers(family: Family, folder: Path, lora: LoraSettings, *told: Tensor) -> None:
    """Students in a folder, as diffusers loads them onto the guided network, say what ours do, and not the teacher."""
    students = LoraStudents(family.load_model(guided=True), lora=lora)
    for direction in DIRECTIONS:
        file = StudentFile.read(folder / direction)
        students.load(direction, file)
        plain = family.load_model(guided=True)
        plain.network.load_lora_adapter(file.path.parent, weight_name=file.path.name, prefix=file.part)
        expected = plain.predict(*told)
        torch.testing.assert_close(students.predict(direction, *told), expected)
        assert not torch.allclose(students.predict("teacher", *told), expected, atol=1e-5)
