from pathlib import Path
from zlib import crc32

import pytest
import torch
from evaluation_case import train
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_case import FEW, distillation, same, scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.evaluation import pipeline_of
from icd_lightning.callbacks.generation import GenerationCallback
from icd_lightning.callbacks.reconstruction import GuidanceSweep, ReconstructionCallback
from icd_lightning.callbacks.segments import SegmentLosses
from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import StepGuidance
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tiny.datamodule import SceneDataModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

DECODING = StepGuidance(3.0, 0.8)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("held_out"), 6, seed=9)


def data_for(scenes: Path, held_out: Path):
    return scenes_data(scenes, val_urls=str(held_out), val_batch_size=3)


def test_it_logs_what_the_pipeline_gives(random_family, scenes, held_out, tmp_path):
    task, data = distillation(random_family, decoding=DECODING), data_for(scenes, held_out)
    callbacks = [
        ReconstructionCallback(["psnr", "ssim", "latent-nll"], num_images=5),
        GuidanceSweep([1, 1.5], num_images=5),
    ]
    (metrics,) = trainer_for(tmp_path, callbacks=callbacks).validate(task, data, verbose=False)
    pipeline, parts = pipeline_of(task), []
    for count, batch in zip((3, 2), data.val_dataloader(), strict=True):  # pictures 0 to 2, then 3 and 4
        images, captions = batch.images[:count], batch.captions[:count]
        noise = pipeline.invert(images, captions, seed=[crc32(key.encode()) for key in batch.keys[:count]])
        guidances = (StepGuidance(1.0), DECODING, StepGuidance(1.5, 0.8))
        parts.append([images, noise, *(pipeline.generate(captions, noise, guidance=g) for g in guidances)])
    images, noise, *results = (torch.cat(part) for part in zip(*parts, strict=True))
    names = ("reconstruction/psnr", "reconstruction_guided/psnr", "guidance_sweep/psnr_w1.5")
    for name, result in zip(names, results, strict=True):
        assert metrics[name] == pytest.approx(psnr(result, images).mean().item(), rel=1e-5)
    assert metrics["guidance_sweep/psnr_w1"] == metrics["reconstruction/psnr"]
    for name, result in zip(("reconstruction", "reconstruction_guided"), results, strict=False):
        error = task.autoencoder.encode(result) - task.autoencoder.encode(images)
        assert metrics[f"{name}/latent_mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert metrics[f"{name}/latent-nll"] == pytest.approx(0.5 * noise.square().mean().item() + 0.918939, rel=1e-4)
        assert -1 < metrics[f"{name}/ssim"] < 1


def test_each_validation_is_measured_by_itself(random_family, scenes, held_out, tmp_path):
    """What an earlier one saw, of other weights, is forgotten."""
    task, data = distillation(random_family), data_for(scenes, held_out)
    trainer, fresh = (
        trainer_for(tmp_path, callbacks=[ReconstructionCallback(["psnr"], num_images=3)]) for _ in range(2)
    )
    (first,) = trainer.validate(task, data, verbose=False)
    with torch.no_grad():
        for parameter in task.students.parameters_of("reverse"):
            parameter.mul_(3)
    (second,), (alone,) = (one.validate(task, data, verbose=False) for one in (trainer, fresh))
    assert second["reconstruction/psnr"] == alone["reconstruction/psnr"] != first["reconstruction/psnr"]


def test_looking_leaves_no_trace_in_the_training(random_family, scenes, held_out, tmp_path):
    """Random streams, the adapter that is on, modes, what is trainable, and every weight: as if nobody had looked."""
    blind = train(random_family, scenes, held_out, tmp_path, max_steps=2, limit_val_batches=0)
    callbacks = [
        ReconstructionCallback(["tiny", "latent-nll"], num_images=2),
        GuidanceSweep([1, 3], num_images=2),
        GenerationCallback(["tiny-fd", "tiny-agreement"], num_images=2),
        SegmentLosses(),
    ]
    watched = train(random_family, scenes, held_out, tmp_path, *callbacks, max_steps=2, val_check_interval=1)
    assert len({drawn for step in blind[0] for drawn in step}) == 6  # it really draws, from three streams
    assert watched[0] == blind[0]
    assert watched[1] == blind[1]
    assert all(same(weights, blind[2][direction]) for direction, weights in watched[2].items())


def test_pictures_and_captions_reach_tensorboard(random_family, scenes, held_out, tmp_path):
    trainer = trainer_for(
        tmp_path,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        max_steps=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=[ReconstructionCallback(grid_columns=2)],
    )
    trainer.fit(distillation(random_family, students=FEW, decoding=DECODING), datamodule=data_for(scenes, held_out))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    (name,) = events.Tags()["images"]
    assert name == "pictures/inversion"
    (grid,) = events.Images(name)
    assert grid.step == 1
    assert grid.width == 8 + 150 + 2 * 135 + 8  # labels, and columns of pictures
    assert grid.height > 5 * 128  # rows: original, its noise, back, back guided, generated; and captions below
    assert "reconstruction/psnr" in events.Tags()["scalars"]


def test_unequal_batches_of_ranks_are_looked_at_equally_often(random_family, tmp_path):
    """Rank 1 of 2 gets smaller batches: it must go on for as long as rank 0 does, and the other way round."""

    class Counting(ReconstructionCallback):
        def look(self, trainer, task, batch, *, seeds, draw) -> None:
            self.looks.append((len(batch.captions), seeds, draw))

    class OtherRank:
        """Decides with one that has had enough, or has not."""

        world_size, global_rank = 2, 1

        def __init__(self, others: list[bool]) -> None:
            self.strategy, self.others = self, iter(others)

        def reduce_boolean_decision(self, decision: bool, all: bool) -> bool:
            assert not all
            return decision | next(self.others)

    task, callback = distillation(random_family, students=FEW), Counting(num_images=4)
    callback.looks = []
    callback.setup(None, task, "validate")
    batch = next(iter(SceneDataModule(val_count=3, val_batch_size=3).val_dataloader()))
    callback.on_validation_epoch_start(None, task)
    trainer = OtherRank([True, True, True, False])
    for index in range(4):
        callback.on_validation_batch_end(trainer, task, None, batch, index)
    seeds = [crc32(key.encode()) for key in batch.keys]
    # at one picture when it has enough
    assert callback.looks == [(3, seeds, True), (1, seeds[:1], False), (1, seeds[:1], False)]
    assert len(set(seeds)) == 3


def test_a_missing_network_ends_the_run_before_it_trains(random_family, scenes, held_out, tmp_path, monkeypatch):
    for variable in ("ICD_METRICS_HOME", "TORCH_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    task, callback = distillation(random_family, students=FEW), ReconstructionCallback(["psnr", "lpips"])
    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[callback])
    with pytest.raises(FileNotFoundError, match="metric lpips lacks its network: put https://"):
        trainer.fit(task, datamodule=data_for(scenes, held_out))
    assert trainer.global_step == 0


def test_latents_instead_of_pictures_are_refused(random_family, tmp_path):
    task, callback = distillation(random_family, students=FEW), ReconstructionCallback()
    trainer = trainer_for(tmp_path)
    batch = Batch(None, ["a red star"], ["0"], [{}], torch.zeros(1, 16, 8, 8))
    with pytest.raises(ValueError, match="compares pictures, and the validation data holds latents"):
        callback.on_validation_batch_end(trainer, task, None, batch, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReconstructionCallback(["psnrr"]), "no metric 'psnrr'; there is: psnr, ssim"),
        (lambda: ReconstructionCallback([]), "measure nothing"),
        (lambda: ReconstructionCallback(num_images=0), "num_images 0"),
        (lambda: ReconstructionCallback(grid_columns=0), "grid_columns 0"),
        (lambda: GuidanceSweep([]), "at least one"),
        (lambda: GuidanceSweep([0.5]), "must be 1"),
        (lambda: GenerationCallback(["tiny-fd"], grid_columns=0), "grid_columns 0"),
    ],
)
def test_what_measures_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [ReconstructionCallback, SegmentLosses])
def test_a_task_without_students_is_refused(random_family, scenes, held_out, tmp_path, make):
    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[make()])
    with pytest.raises(ValueError, match="GuidanceDistillation has none"):
        trainer.fit(GuidanceDistillation(Family(str(random_family))), datamodule=data_for(scenes, held_out))
