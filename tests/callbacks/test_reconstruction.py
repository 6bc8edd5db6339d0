from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_case import FEW, Losses, distillation, same, scenes_data, student_weights, trainer_for, write_scenes

from icd_lightning.callbacks.reconstruction import ReconstructionCallback, pipeline_of
from icd_lightning.diffusion import StepGuidance
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.models.family import Family
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation

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
    metrics = trainer_for(tmp_path, callbacks=[ReconstructionCallback(num_images=5)]).validate(
        task, data, verbose=False
    )
    pipeline, parts = pipeline_of(task), []
    for seed, batch in zip((0, 3), data.val_dataloader(), strict=True):
        count = min(3, 5 - seed)  # pictures 0 to 2, then 3 and 4
        images, captions = batch.images[:count], batch.captions[:count]
        noise = pipeline.invert(images, captions, seed=seed)
        parts.append(
            [images, pipeline.generate(captions, noise), pipeline.generate(captions, noise, guidance=DECODING)]
        )
    images, *results = (torch.cat(part) for part in zip(*parts, strict=True))
    for name, result in zip(("reconstruction", "reconstruction_guided"), results, strict=True):
        assert metrics[0][f"{name}/psnr"] == pytest.approx(psnr(result, images).mean().item(), rel=1e-5)
        error = task.autoencoder.encode(result) - task.autoencoder.encode(images)
        assert metrics[0][f"{name}/latent_mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert -1 < metrics[0][f"{name}/ssim"] < 1


def test_looking_does_not_disturb_the_training(random_family, scenes, held_out, tmp_path):
    def train(*callbacks, **options):
        task, losses = distillation(random_family, **FEW), Losses()
        options = {"max_steps": 3, "check_val_every_n_epoch": None, "callbacks": [losses, *callbacks], **options}
        trainer_for(tmp_path, **options).fit(task, datamodule=data_for(scenes, held_out))
        return losses.values, student_weights(task)

    blind, watched = train(limit_val_batches=0), train(ReconstructionCallback(), val_check_interval=2)
    assert watched[0] == blind[0]
    assert all(same(weights, blind[1][direction]) for direction, weights in watched[1].items())


def test_pictures_and_captions_reach_tensorboard(random_family, scenes, held_out, tmp_path):
    trainer = trainer_for(
        tmp_path,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        max_steps=1,
        val_check_interval=1,
        check_val_every_n_epoch=None,
        callbacks=[ReconstructionCallback(grid_columns=4)],
    )
    trainer.fit(distillation(random_family, **FEW), datamodule=data_for(scenes, held_out))
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    events.Reload()
    (name,) = events.Tags()["images"]
    assert name == "original, reconstructed, guided, generated"
    (grid,) = events.Images(name)
    assert (grid.step, grid.width, grid.height) == (1, 3 * 64 * 2, 4 * 64 * 2)  # columns and rows, enlarged twice
    assert "captions/text_summary" in events.Tags()["tensors"]
    assert "reconstruction/psnr" in events.Tags()["scalars"]


def test_an_unknown_metric_and_no_pictures_are_refused():
    with pytest.raises(ValueError, match="no metric 'psnrr'; there is: psnr, ssim"):
        ReconstructionCallback(["psnrr"])
    with pytest.raises(ValueError, match="num_images 0"):
        ReconstructionCallback(num_images=0)


def test_a_task_without_students_is_refused(random_family, scenes, held_out, tmp_path):
    trainer = trainer_for(tmp_path, max_steps=1, callbacks=[ReconstructionCallback()])
    with pytest.raises(ValueError, match="GuidanceDistillation has none"):
        trainer.fit(GuidanceDistillation(Family(str(random_family))), datamodule=data_for(scenes, held_out))
