import logging
import os
import signal
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from toy_case import Toy, toy_loader
from training_case import trainer_for

from icd_lightning.callbacks.averaging import ExponentialAverage
from icd_lightning.callbacks.checkpoint import RunCheckpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::UserWarning:torch")


class Send(lightning.Callback):
    """Sends this process signals in the middle of a micro-batch."""

    def __init__(self, batch_idx: int, *signals: int) -> None:
        self.batch_idx, self.signals = batch_idx, signals

    def on_after_backward(self, trainer, pl_module) -> None:
        if trainer.fit_loop.batch_idx == self.batch_idx:
            for number in self.signals:
                os.kill(os.getpid(), number)


class FailIn(lightning.Callback):
    """Fails in the first validation."""

    def on_validation_batch_start(self, trainer, *_) -> None:
        raise RuntimeError("failed")


@pytest.fixture(autouse=True)
def _signals():
    """As in a terminal: Lightning ignores SIGINT from the first one on, and so does what runs in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def fit(folder, *callbacks, every: int = 100, **options) -> Toy:
    task = Toy()
    options = {"max_steps": 8, "callbacks": [*callbacks, RunCheckpoint(every)], "enable_checkpointing": True, **options}
    trainer_for(folder, **options).fit(task, toy_loader(), toy_loader(2), ckpt_path="last")
    return task


def saved(folder) -> dict:
    assert {file.name for file in (folder / "checkpoints").iterdir()} <= {"last.ckpt", "before-last.ckpt"}
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_a_whole_step_that_is_saved(tmp_path, number):
    whole = fit(tmp_path / "whole")
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "run", Send(2, number))
    assert ended.value.code == {signal.SIGINT: 1, signal.SIGTERM: 143}[number]  # `icd` makes 130 of Lightning's 1
    assert saved(tmp_path / "run")["global_step"] == 3
    assert fit(tmp_path / "run").number.item() == whole.number.item()
    assert saved(tmp_path / "run")["global_step"] == 8
    before = torch.load(tmp_path / "run" / "checkpoints" / "before-last.ckpt", weights_only=True)
    assert before["global_step"] == 3


def test_it_waits_for_the_last_micro_batch_of_a_step(tmp_path):
    options = {"accumulate_grad_batches": 3, "max_steps": 4}
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", Send(3, signal.SIGINT), **options)
    state = saved(tmp_path / "run")
    assert state["global_step"] == 2
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 6
    assert fit(tmp_path / "run", **options).number.item() == whole.number.item()


def test_a_second_signal_stops_at_once_and_saves_nothing(tmp_path):
    with pytest.raises(SystemExit):
        fit(tmp_path, Send(4, signal.SIGINT, signal.SIGINT), every=3)
    assert saved(tmp_path)["global_step"] == 3


def test_an_error_leaves_the_checkpoint_before(tmp_path):
    """In a validation the averaged weights stand in the place of the trained ones: not a moment to save."""
    options = {"val_check_interval": 5, "check_val_every_n_epoch": None, "every": 3}
    with pytest.raises(RuntimeError, match="failed"):
        fit(tmp_path / "run", ExponentialAverage(0.5), FailIn(), **options)
    assert saved(tmp_path / "run")["global_step"] == 3
    whole = fit(tmp_path / "whole", ExponentialAverage(0.5), **options)
    assert fit(tmp_path / "run", ExponentialAverage(0.5), **options).number.item() == whole.number.item()


@pytest.mark.parametrize("options", [{"max_steps": 5}, {"max_steps": -1, "max_epochs": 1, "limit_train_batches": 5}])
def test_the_last_step_is_saved_whatever_ends_the_run(tmp_path, options):
    fit(tmp_path, every=2, **options)
    assert saved(tmp_path)["global_step"] == 5


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A SLURM job with an `scontrol` that writes down what it is asked; where it does so."""
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    for name, value in {"JOB_ID": "17", "NTASKS": "1", "LOCALID": "0", "PROCID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return asked


def test_a_slurm_job_is_saved_between_two_steps_and_requeued(tmp_path, slurm):
    options = {"accumulate_grad_batches": 3, "max_steps": 4}
    whole = fit(tmp_path / "whole", **options)
    before = signal.getsignal(signal.SIGUSR1)
    left = tmp_path / "run" / "hpc_ckpt_3.ckpt"  # Lightning's own, by a requeue before: as large as last.ckpt
    left.parent.mkdir()
    left.touch()
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", Send(3, signal.SIGUSR1), plugins=[SLURMEnvironment()], **options)
    assert slurm.read_text().splitlines() == ["requeue 17"]
    assert len(list(left.parent.glob("hpc_ckpt_*"))) == 1
    assert not left.exists()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert saved(tmp_path / "run")["global_step"] == 2
    assert fit(tmp_path / "run", **options).number.item() == whole.number.item()


def test_a_finished_run_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "icd_lightning")
    for max_steps in (8, 5):
        fit(tmp_path, max_steps=max_steps)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("icd_lightning")]
    assert said == ["already at step 8 of 5; raise trainer.max_steps to go on"]


def test_a_run_in_the_background_goes_on_ignoring_ctrl_c(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    fit(tmp_path, Send(2, signal.SIGINT))
    assert saved(tmp_path)["global_step"] == 8


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(tmp_path, max_steps=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_no_steps_between_checkpoints_are_refused():
    with pytest.raises(ValueError, match="every_n_train_steps 0 must be 1 or more"):
        RunCheckpoint(0)
