"""Generation, losses by segment, and the row of final metrics, in a real training."""

from itertools import pairwise
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_case import FEW, distillation, scenes_data, trainer_for, write_scenes

from icd_lightning.callbacks.evaluation import grid, noise_images, pipeline_of
from icd_lightning.callbacks.generation import GenerationCallback
from icd_lightning.callbacks.hparams import FinalMetrics
from icd_lightning.callbacks.segments import SegmentLosses
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.method import seeded_noise
from icd_lightning.metrics.registry import build_metrics

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("held_out"), 6, seed=9)


def data_for(held_out: Path):
    return scenes_data(held_out, val_urls=str(held_out), val_batch_size=3)


def test_it_measures_what_is_generated_from_the_captions(random_family, held_out, tmp_path):
    decoding = StepGuidance(3.0, 0.8)
    task, data = distillation(random_family, decoding=decoding), data_for(held_out)
    names = ["tiny-fd", "tiny-agreement"]
    (found,) = trainer_for(tmp_path, callbacks=[GenerationCallback(names)]).validate(task, data, verbose=False)
    metrics, pipeline = build_metrics(names), pipeline_of(task)
    for batch in data.val_dataloader():
        noise = seeded_noise((3, 16, 8, 8), [crc32(key.encode()) for key in batch.keys])
        result = pipeline.generate(batch.captions, noise, guidance=decoding)
        for metric in metrics.values():
            metric.update(result, batch.images, prompts=batch.captions)
    for name, metric in metrics.items():
        assert found[f"generation/{name}"] == pytest.approx(metric.compute().item(), rel=1e-4)


# Losses by segment


def test_losses_are_those_of_the_segment_they_were_taken_in(random_family, held_out, tmp_path):
    task, data = distillation(random_family, students=FEW), data_for(held_out)
    (found,) = trainer_for(tmp_path, callbacks=[SegmentLosses()]).validate(task, data, verbose=False)
    segments = [f"{lower}-{upper}" for lower, upper in pairwise(task.boundaries.boundary_timesteps)]
    values = {name: {segment: [] for segment in segments} for name in task.losses}
    for index, batch in enumerate(data.val_dataloader()):
        draws = task.validation_draws(index)
        for name, loss in task.evaluate(task.losses, task.inputs(batch, draws), draws).items():
            for value, segment in zip(loss.values, loss.segments, strict=True):
                values[name][segments[segment]].append(value.item())
    expected = {
        f"{name}_by_segment/{segment}": np.mean(those)
        for name, parts in values.items()
        for segment, those in parts.items()
        if those
    }
    assert {name: value for name, value in found.items() if "by_segment" in name} == pytest.approx(expected, rel=1e-4)
    assert len(expected) > 8  # of 16, at 6 samples


# Final metrics


def test_the_run_becomes_a_row_of_settings_and_final_metrics(random_family, held_out, tmp_path):
    model = Namespace(class_path="X", init_args=Namespace(seed=5, decoding=Namespace(tau=0.5)))
    saved = SaveConfigCallback(ArgumentParser(), Namespace(model=model, data=Namespace(batch_size=2)), overwrite=True)
    callbacks = [saved, GenerationCallback(["tiny-agreement"]), FinalMetrics()]
    trainer = trainer_for(
        tmp_path,
        logger=TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False),
        max_steps=2,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
    )
    saved.already_saved = True  # its parser is no LightningCLI's
    trainer.fit(distillation(random_family, students=FEW), datamodule=data_for(held_out))
    assert dict(trainer.logger.hparams) == {
        "max_steps": 2,
        "model.class_path": "X",
        "model.seed": 5,
        "model.decoding.tau": 0.5,
        "data.batch_size": 2,
    }
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"final/generation/tiny-agreement", "final/val/reverse_cd"} <= set(scalars)
    (final,) = events.Scalars("final/generation/tiny-agreement")
    assert final.value == events.Scalars("generation/tiny-agreement")[-1].value
    assert not any(name.startswith("final/train") for name in scalars)
    assert "pictures/samples" in events.Tags()["images"]


# Pictures


def test_a_grid_holds_its_pictures_with_labels_and_captions():
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 64, 64)
    sheet = grid({"first": images, "second": -images}, ["a red star", "a blue ring " * 4, ""]).astype(int)
    assert sheet.shape[1] == 8 + 150 + 3 * 135 + 8
    black, gray = (sheet == 0).all(-1), (abs(sheet - 128) < 2).all(-1)
    assert [black.sum(), gray.sum()] == pytest.approx([2 * 128**2, 2 * 128**2], rel=0.02)
    (row, column), (_, other) = ([span[0] for span in np.nonzero(where)] for where in (black, gray))
    assert other - column == pytest.approx(135, abs=8)
    captions = sheet[: row - 2]
    assert (captions[:, column : column + 128] < 128).any()
    assert (captions[:, column + 2 * 135 :] == 255).all()  # no caption
    assert (sheet[row:, : column - 8] < 128).any()  # the labels' ink


def test_noise_is_shown_three_deviations_wide():
    noise = torch.tensor([3.0, -3.0, 0.0, 9.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    shown = noise_images(noise, torch.zeros(1, 3, 8, 8))
    assert shown.shape == (1, 3, 8, 8)
    assert shown[0, :, 0, 0].tolist() == [1, -1, 0]
