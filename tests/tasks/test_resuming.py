"""Accumulated, interrupted and averaged trainings of stage 2, against plain ones."""

from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from often_case import often
from training_case import FEW, Losses, distillation, frozen_weights, same, scenes_data, student_weights, trainer_for

from icd_lightning.callbacks.averaging import ExponentialAverage
from icd_lightning.callbacks.checkpoint import RunCheckpoint
from icd_lightning.diffusion.draws import Draws
from icd_lightning.models.students import DIRECTIONS, LoraSettings, LoraStudents
from icd_lightning.tasks.base import OptimizerSettings
from icd_lightning.tasks.invertible_consistency import Losses as Named

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


def test_accumulated_micro_batches_are_one_step_by_their_mean_gradient(random_family, scenes, tmp_path):
    task = distillation(random_family, optimizer=OptimizerSettings(clip=None))
    by_micro_batch, found = [], []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            draws = Draws(0, batch_idx)
            losses = task.evaluate(task.losses, task.inputs(batch, draws), draws)
            loss = sum(task.losses[name].weight * loss.values.mean() for name, loss in losses.items())
            trained = [p for p in task.parameters() if p.requires_grad]
            by_micro_batch.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            found.append(torch.cat([p.grad.flatten() for p in task.parameters() if p.requires_grad]))

    trainer = trainer_for(tmp_path, max_steps=1, accumulate_grad_batches=2, callbacks=[Watch()])
    trainer.fit(task, datamodule=scenes_data(scenes))
    assert len(found) == 1
    assert len(by_micro_batch) == 2
    torch.testing.assert_close(found[0], torch.stack(by_micro_batch).mean(0), rtol=1e-4, atol=1e-6)


TWO = Named(reverse_cd=None, forward_preservation=None)
RUNS = {
    "plain": ({}, (), Named()),
    "accumulated": ({"accumulate_grad_batches": 2}, (), TWO),
    "averaged": ({}, (ExponentialAverage,), TWO),
}
DECAYING = OptimizerSettings(lr=1e-3, warmup_steps=2, decay="cosine")


class Kill(lightning.Callback):
    """Fails in the middle of a step, as a machine does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def fit(random_family, scenes, folder: Path, run: str, *callbacks, optimizer=DECAYING, max_steps: int = 4):
    """A run with a checkpoint at every second step, from the last one if there is one; its losses and its task."""
    options, averages, weights = RUNS[run]
    losses, task = Losses(), distillation(random_family, optimizer=optimizer, losses=weights, students=FEW)
    callbacks = [*(make(0.5) for make in averages), losses, RunCheckpoint(2), *callbacks]
    trainer = trainer_for(folder, max_steps=max_steps, callbacks=callbacks, enable_checkpointing=True, **options)
    with suppress(RuntimeError):
        trainer.fit(task, datamodule=scenes_data(scenes), ckpt_path="last")
    return losses.values, task


@pytest.mark.parametrize("run", often(RUNS, "averaged"))
def test_a_killed_and_resumed_run_equals_an_unbroken_one_bit_for_bit(random_family, scenes, tmp_path, run):
    whole, unbroken = fit(random_family, scenes, tmp_path / "whole", run)
    before, _ = fit(random_family, scenes, tmp_path / "broken", run, Kill(3))
    rest, resumed = fit(random_family, scenes, tmp_path / "broken", run)
    micro = RUNS[run][0].get("accumulate_grad_batches", 1)
    assert len(whole) == 4 * micro
    assert before == whole[: 3 * micro]
    assert rest == whole[2 * micro :]  # the step after the checkpoint is done again
    for direction, weights in student_weights(unbroken).items():
        assert same(student_weights(resumed)[direction], weights)


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps_as_one_longer_from_the_start(random_family, scenes, tmp_path):
    settings = {"run": "averaged", "optimizer": OptimizerSettings(lr=1e-3, warmup_steps=2)}
    whole, unbroken = fit(random_family, scenes, tmp_path / "whole", max_steps=3, **settings)
    fit(random_family, scenes, tmp_path / "longer", max_steps=1, **settings)
    again, _ = fit(random_family, scenes, tmp_path / "longer", max_steps=1, **settings)
    rest, longer = fit(random_family, scenes, tmp_path / "longer", max_steps=3, **settings)
    assert again == []  # there was nothing left to do
    assert rest == whole[1:]
    for direction, weights in student_weights(unbroken).items():
        assert same(student_weights(longer)[direction], weights)


def test_a_finished_run_started_again_leaves_its_averages_in_place(random_family, scenes, tmp_path):
    _, first = fit(random_family, scenes, tmp_path, "averaged", max_steps=2)
    losses, again = fit(random_family, scenes, tmp_path, "averaged", max_steps=2)
    assert losses == []
    for direction, weights in student_weights(first).items():
        assert same(student_weights(again)[direction], weights)


def test_averaged_weights_are_exported(random_family, scenes, tmp_path):
    task, steps = distillation(random_family), []

    class Record(lightning.Callback):
        def on_train_batch_end(self, *_) -> None:
            steps.append(student_weights(task))

    frozen = frozen_weights(task)
    trainer = trainer_for(tmp_path, max_steps=3, callbacks=[Record(), ExponentialAverage(0.75)])
    trainer.fit(task, datamodule=scenes_data(scenes))
    task.export(tmp_path)
    exported = student_weights(
        distillation(
            random_family,
            students=partial(LoraStudents, lora=LoraSettings(rank=4), **{d: str(tmp_path / d) for d in DIRECTIONS}),
        )
    )
    for direction, weights in exported.items():
        for name, weight in weights.items():
            first, second, third = (step[direction][name] for step in steps)
            expected = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
            assert not torch.equal(weight, third)
    assert same(frozen_weights(task), frozen)
