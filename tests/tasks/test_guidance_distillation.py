import pytest
import torch
from training_case import distillation, frozen_weights, same, scenes_data, trainer_for

from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.diffusion import Draws
from icd_lightning.models.family import Family
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.guidance_distillation import GuidanceDistillation
from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.scenes import scene_at

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")

SCALES = (1.0, 3.0, 5.0)


def stage_one(random_family, **options) -> GuidanceDistillation:
    return GuidanceDistillation(
        Family(str(random_family)), SCALES, optimizer=OptimizerSettings(lr=5e-4, betas=(0.9, 0.99)), **options
    )


@pytest.fixture(scope="module")
def batch():
    return scene_batch([scene_at(1, i) for i in range(8)], [str(i) for i in range(8)])


def error(task: GuidanceDistillation, batch, w: float) -> float:
    with torch.no_grad():
        return task.loss(batch, torch.full((len(batch.captions),), w), Draws(0, 0)).mean().item()


@pytest.fixture(scope="module")
def trained(random_family, scenes, batch, tmp_path_factory):
    """A task after 12 steps, its folder, and the errors and frozen weights that it began with."""
    folder, task = tmp_path_factory.mktemp("guidance"), stage_one(random_family)
    before, frozen = {w: error(task, batch, w) for w in SCALES}, frozen_weights(task)
    trainer = trainer_for(folder, max_steps=12, callbacks=[RunCheckpoint()], enable_checkpointing=True)
    trainer.fit(task, datamodule=scenes_data(scenes, batch_size=8))
    task.export(folder)
    return task, folder, before, frozen


def test_the_student_begins_as_the_teacher_without_guidance(trained):
    *_, before, _ = trained
    assert before[1.0] < 1e-10
    assert 1e-8 < before[3.0] < before[5.0]


def test_training_teaches_the_guidance_scale(trained, batch):
    task, _, before, _ = trained
    for w in (3.0, 5.0):
        assert error(task, batch, w) < 0.8 * before[w], w


def test_the_teacher_stays_frozen_and_out_of_the_checkpoint(trained):
    task, folder, _, frozen = trained
    assert any(name.startswith("teacher.") for name in frozen)
    assert same(frozen_weights(task), frozen)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"student.{name}" for name, _ in task.student.named_parameters()}


def test_what_it_exports_is_the_teacher_of_stage_two(random_family, trained, batch):
    task, folder, *_ = trained
    loaded = Family(str(random_family), guided_unet=str(folder / "unet_guided")).load_model(guided=True).network
    assert same(loaded.state_dict(), task.student.state_dict())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    family = Family(str(random_family), guided_unet=str(folder / "unet_guided"))
    stage_two = type(distillation(random_family))(family, guidance_scales=SCALES)
    losses = stage_two.evaluate(stage_two.losses, stage_two.inputs(batch, Draws(0, 0)), Draws(0, 0))
    assert all(torch.isfinite(loss.values).all() for loss in losses.values())


def test_the_student_begins_as_the_teacher_was_saved_not_as_it_is_rounded_to_run(random_family):
    task = GuidanceDistillation(Family(str(random_family), precision="bfloat16"), SCALES)
    saved = Family(str(random_family)).load_model(guided=False).network.state_dict()
    assert {p.dtype for p in task.teacher.parameters()} == {torch.bfloat16}
    assert all(torch.equal(task.student.state_dict()[name], weight) for name, weight in saved.items())


def test_what_stage_one_cannot_train_is_refused(random_family):
    with pytest.raises(ValueError, match=r"guidance_scales \[-0.5, 3\] must be 0"):
        GuidanceDistillation(Family(str(random_family)), (-0.5, 3))
    with pytest.raises(ValueError, match="at least one"):
        GuidanceDistillation(Family(str(random_family)), ())
    with pytest.raises(ValueError, match="quantization int8 is of frozen weights"):
        GuidanceDistillation(Family(str(random_family), quantization="int8"))


@pytest.mark.parametrize(("trained_at", "pixels"), [(None, 64), (32, 32), (None, 32), (64, 32)])
def test_data_of_another_size_than_the_familys_are_told_of_or_refused(
    random_family, scenes, tmp_path, caplog, trained_at, pixels
):
    """They may be meant, unless trained_at says another."""
    task = GuidanceDistillation(Family(str(random_family), trained_at=trained_at))
    trainer, data = trainer_for(tmp_path, max_steps=0), scenes_data(scenes, resolution=pixels)
    if trained_at == 64:
        with pytest.raises(ValueError, match=r"of 32 pixels .* is 64: give family.trained_at 32, or data of 64"):
            trainer.fit(task, datamodule=data)
        return
    trainer.fit(task, datamodule=data)
    told = [record.getMessage() for record in caplog.records if "pixels a side" in record.getMessage()]
    assert len(told) == ((trained_at, pixels) == (None, 32))


def test_validation_logs_an_error_for_each_scale(random_family, scenes, tmp_path, batch):
    task = stage_one(random_family)
    trainer, data = trainer_for(tmp_path, limit_val_batches=2), scenes_data(scenes, val_urls=str(scenes))
    metrics, again = (trainer.validate(task, datamodule=data, verbose=False)[0] for _ in range(2))
    assert metrics.keys() == {"val/error_w1", "val/error_w3", "val/error_w5"}
    assert metrics == again  # the same noise and timesteps every time


def test_balance_weighs_each_scale_by_what_is_to_be_learned(random_family, batch, monkeypatch):
    """Errors of (w - 1)^2, as of a student that ignores w, then count almost alike."""
    w = Draws(0, 0).choice(8, SCALES)
    for balance in (0.0, 1.0, 4.0):
        task = stage_one(random_family, balance=balance)
        monkeypatch.setattr(task, "loss", lambda batch, w, draws: (w - 1) ** 2)
        monkeypatch.setattr(task, "draws", lambda: Draws(0, 0))
        monkeypatch.setattr(task, "log_losses", lambda total, parts: None)
        expected = ((w - 1) ** 2 / (1 + balance * (w - 1) ** 2)).mean().item()
        assert task.training_step(batch, 0).item() == pytest.approx(expected)
