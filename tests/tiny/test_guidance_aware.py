import pytest
import torch
from training_case import frozen_weights, same, scenes_data, trainer_for

from icd_lightning.diffusion import Draws
from icd_lightning.diffusion.guidance import classifier_free_guidance
from icd_lightning.models.family import Family
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.scenes import scene_at
from icd_lightning.tiny.train_guidance_aware import GuidanceAwareTraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

SCALES = (2.0, 5.0)


def aware(random_family, **options) -> GuidanceAwareTraining:
    settings = {"guidance_scales": SCALES, "optimizer": OptimizerSettings(lr=5e-4, betas=(0.9, 0.99)), **options}
    return GuidanceAwareTraining(Family(str(random_family)), **settings)


@pytest.fixture(scope="module")
def batch():
    return scene_batch([scene_at(1, i) for i in range(8)], [str(i) for i in range(8)])


def losses(task: GuidanceAwareTraining, batch) -> dict[str, float]:
    with torch.no_grad():
        return {name: value.item() for name, value in task.losses(batch, Draws(0, 0)).items()}


def stage_one_error(family: Family, batch, w: float) -> float:
    """Of a student that has learned nothing yet."""
    task = GuidanceDistillation(family, (w,))
    with torch.no_grad():
        return task.loss(batch, torch.full((len(batch.captions),), w), Draws(0, 0)).mean().item()


@pytest.fixture(scope="module")
def trained(random_family, scenes, batch, tmp_path_factory):
    """A task after 12 steps, its folder, and the losses and frozen weights that it began with."""
    folder, task = tmp_path_factory.mktemp("aware"), aware(random_family)
    before, frozen = losses(task, batch), frozen_weights(task)
    trainer_for(folder, max_steps=12).fit(task, datamodule=scenes_data(scenes, batch_size=8))
    task.export(folder)
    return task, folder, before, frozen


def test_at_first_a_guided_prediction_lacks_all_that_guidance_adds(random_family, batch):
    """The embedding starts at zero, so that the error at w is (w - 1)^2 times the unconditional one."""
    unconditional = losses(aware(random_family), batch)["unconditional"]
    one_scale = GuidanceAwareTraining(Family(str(random_family)), (3.0,), balance=0.0)
    assert losses(one_scale, batch)["guided"] == pytest.approx(4 * unconditional, rel=1e-4)
    assert unconditional > 0


def test_training_brings_guided_predictions_within_reach(trained, batch):
    task, _, before, _ = trained
    after = losses(task, batch)
    assert after["guided"] < 0.8 * before["guided"]
    assert after["denoising"] < before["denoising"]


def test_only_the_network_moves(trained):
    task, _, _, frozen = trained
    assert {name.split(".")[0] for name in frozen} == {"autoencoder", "conditioner"}
    assert same(frozen_weights(task), frozen)


def test_the_guided_loss_moves_its_goal_too(random_family, batch, monkeypatch):
    task, gradients = aware(random_family), []
    for guide in (classifier_free_guidance, lambda *predictions: classifier_free_guidance(*predictions).detach()):
        monkeypatch.setattr("icd_lightning.tiny.train_guidance_aware.classifier_free_guidance", guide)
        task.zero_grad()
        task.losses(batch, Draws(0, 0))["guided"].backward()
        gradients.append(task.network.conv_out.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()


def test_what_it_exports_is_the_teacher_of_stage_one(random_family, trained, batch, tmp_path):
    _, folder, *_ = trained
    (tmp_path / "family").mkdir()
    for part in random_family.iterdir():
        (tmp_path / "family" / part.name).symlink_to(folder / "unet" if part.name == "unet" else part)
    family = Family(str(tmp_path / "family"))
    teacher = family.load_model(guided=False).network
    assert teacher.config.time_cond_proj_dim is None
    assert stage_one_error(family, batch, 1.0) < 1e-10
    assert stage_one_error(family, batch, 2.0) == pytest.approx(stage_one_error(family, batch, 3.0) / 4, rel=1e-3)


def test_validation_logs_the_losses(random_family, scenes, tmp_path):
    trainer = trainer_for(tmp_path, limit_val_batches=2)
    metrics = trainer.validate(
        aware(random_family), datamodule=scenes_data(scenes, val_urls=str(scenes)), verbose=False
    )
    assert metrics[0].keys() == {"val/denoising", "val/unconditional", "val/guided"}


def test_wrong_settings_are_refused(random_family):
    with pytest.raises(ValueError, match="guided_weight -1 must be 0 or more"):
        aware(random_family, guided_weight=-1)
    with pytest.raises(ValueError, match="balance -1 must be 0 or more"):
        aware(random_family, balance=-1)
    with pytest.raises(ValueError, match=r"guidance_scales \[1\] hold no guidance"):
        aware(random_family, guidance_scales=[1])
