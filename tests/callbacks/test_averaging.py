import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from toy_case import Toy, toy_loader
from training_case import frozen_weights, same, trainer_for

from icd_lightning.callbacks.averaging import ExponentialAverage
from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.callbacks.export import ExportWeights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


class Numbers(lightning.Callback):
    """The trained number after each step, and in each validation."""

    def __init__(self) -> None:
        self.trained: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.trained.append(pl_module.number.item())

    def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
        self.validated.append(pl_module.number.item())


def test_frozen_weights_and_buffers_of_any_type_stay_bit_for_bit(tmp_path):
    task = Toy()
    frozen = frozen_weights(task)
    trainer_for(tmp_path, max_steps=100, callbacks=[ExponentialAverage(0.99)]).fit(task, toy_loader())
    assert same(frozen_weights(task), frozen)


def test_the_average_is_validated_and_left_in_place_at_the_end(tmp_path):
    task, numbers = Toy(), Numbers()
    trainer = trainer_for(
        tmp_path, max_steps=4, val_check_interval=1, limit_val_batches=1, callbacks=[numbers, ExponentialAverage(0.75)]
    )
    trainer.fit(task, toy_loader(), toy_loader())
    average, expected = numbers.trained[0], []
    for number in numbers.trained:
        average += 0.25 * (number - average)
        expected.append(average)
    assert numbers.validated == pytest.approx(expected, rel=1e-5)
    assert task.number.item() == pytest.approx(expected[-1], rel=1e-5)


@pytest.mark.parametrize("end", [{"max_steps": 4}, {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 4}])
def test_the_same_command_again_on_a_finished_run_exports_the_average(tmp_path, end):
    exported = []
    for _ in range(2):
        callbacks = [ExportWeights(), ExponentialAverage(0.75), RunCheckpoint(100)]
        trainer = trainer_for(tmp_path, callbacks=callbacks, enable_checkpointing=True, **end)
        trainer.fit(Toy(), toy_loader(), ckpt_path="last")
        exported.append(float((tmp_path / "number.txt").read_text()))
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert exported == [saved["state_dict"]["number"].item()] * 2
    assert saved["state_dict"]["number"] != saved["current_model_state"]["number"]


def test_a_validation_after_the_training_sees_the_average_too(tmp_path):
    task, numbers = Toy(), Numbers()
    trainer = trainer_for(tmp_path, max_steps=3, callbacks=[numbers, ExponentialAverage(0.75)])
    trainer.fit(task, toy_loader())
    average = task.number.item()
    trainer.validate(task, toy_loader(2), verbose=False)
    assert numbers.validated == [average] != numbers.trained[-1:]
    assert task.number.item() == average


def test_a_run_averaged_by_lightning_goes_on(tmp_path):
    """Checkpoints of either callback load with the other: both keep the same three entries."""

    def fit(steps: int, *callbacks) -> float:
        task = Toy()
        options = {"max_steps": steps, "callbacks": [*callbacks], "enable_checkpointing": True}
        trainer_for(tmp_path, **options).fit(task, toy_loader(), ckpt_path="last")
        return task.number.item()

    settings = {"save_last": True, "every_n_train_steps": 3, "enable_version_counter": False}
    fit(3, EMAWeightAveraging(decay=0.75), ModelCheckpoint(**settings))
    resumed = fit(6, ExponentialAverage(0.75), RunCheckpoint(3))
    task = Toy()
    trainer_for(tmp_path / "whole", max_steps=6, callbacks=[ExponentialAverage(0.75)]).fit(task, toy_loader())
    assert resumed == pytest.approx(task.number.item(), rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_a_decay_that_never_moves_or_never_remembers_is_refused(decay):
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        ExponentialAverage(decay)
