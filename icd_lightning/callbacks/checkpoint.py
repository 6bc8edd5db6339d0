"""Checkpoints from which a run goes on as if it had never stopped."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import NoReturn

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from icd_lightning.callbacks.checkpoint_io import WholeCheckpointIO

log = logging.getLogger(__name__)


class RunCheckpoint(ModelCheckpoint):
    """Keeps `checkpoints/last.ckpt` in the run's folder: at every `every_n_train_steps`, at the last step, at Ctrl-C.

    Only ever between two optimizer steps. Saved in the middle of one, as Lightning would on an exception, a checkpoint
    may hold half an update, lacks the gradients accumulated so far, and during a validation has averaged weights in the
    place of the trained ones; and a rank that saves because it failed waits for the others for ever. So the first
    Ctrl-C (or SIGTERM) lets the step end, and with several ranks the next one, the same on all; the second stops at
    once, and like any error leaves the checkpoint before. After Ctrl-C the exit code is 130, after SIGTERM 143.

    The file is written by `WholeCheckpointIO`, which keeps the checkpoint before it too.

    On a SLURM cluster Lightning answers SIGUSR1, which `sbatch --signal=SIGUSR1@120` sends before the time is up, by
    saving and requeueing the job at once; here it does so after the step, on all ranks the same one. The requeued job
    goes on from the last checkpoint.
    """

    def __init__(self, every_n_train_steps: int = 250) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps {every_n_train_steps} must be 1 or more")
        super().__init__(
            save_last=True, save_top_k=0, every_n_train_steps=every_n_train_steps, enable_version_counter=False
        )
        self._asked_to_stop = self._asked_to_requeue = self._stopping = self._trained = False
        self._asking: tuple[dist.Work, Tensor] | None = None  # whether any rank was asked to, on its way
        self._terminated = False
        self._handlers: dict[signal.Signals, signal.Handlers] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._trained = True
        self._last_global_step_saved = trainer.global_step  # what was resumed from is saved already
        if threading.current_thread() is threading.main_thread():
            signals = [
                s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN
            ]  # nohup, cmd &
            if callable(signal.getsignal(signal.SIGUSR1)):  # by Lightning, under SLURM
                signals.append(signal.SIGUSR1)
            self._handlers = {number: signal.signal(number, self._ask_to_stop) for number in signals}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        done, stop = 0 <= trainer.max_steps <= trainer.global_step, self._any_asked_to_stop(trainer)
        self._stopping = stop and not done
        if done or stop:
            self._save(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Stop, now that the step before is saved, and logged and validated too."""
        if not self._stopping:
            return
        requeue = trainer.strategy.reduce_boolean_decision(self._asked_to_requeue, all=False)
        if requeue and signal.SIGUSR1 in self._handlers:
            if trainer.is_global_zero:  # of requeues before, which Lightning keeps all
                for old in Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"):
                    old.unlink()
            self._handlers[signal.SIGUSR1](signal.SIGUSR1, None)
        self._end()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save what ended otherwise than by max_steps."""
        self._await_answer()
        self._save(trainer)
        self._restore_handlers()

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._trained and trainer.is_global_zero and 0 <= trainer.max_steps <= trainer.global_step:
            step, last = trainer.global_step, trainer.max_steps
            log.info("already at step %d of %d; raise trainer.max_steps to go on", step, last)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        """Say where the run can go on; nothing is saved here."""
        if not isinstance(exception, (KeyboardInterrupt, SystemExit)):
            self._restore_handlers()
        elif trainer.is_global_zero:
            saved = self._last_global_step_saved
            rest = f"the same command goes on after step {saved} (ckpt_path: last)" if saved else "nothing is saved"
            log.info("stopped at step %d; %s", trainer.global_step, rest)

    def _save(self, trainer: lightning.Trainer) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _any_asked_to_stop(self, trainer: lightning.Trainer) -> bool:
        """Whether any rank was, as of the step before: the question travels while a step is computed."""
        if trainer.world_size == 1:
            return self._asked_to_stop
        answer = self._await_answer()
        asked = torch.tensor(int(self._asked_to_stop), device=trainer.strategy.root_device)
        self._asking = dist.all_reduce(asked, async_op=True), asked
        return answer

    def _await_answer(self) -> bool:
        if self._asking is None:
            return False
        (work, asked), self._asking = self._asking, None
        work.wait()
        return bool(asked)

    def _ask_to_stop(self, signum: int, frame: FrameType | None) -> None:
        self._terminated |= signum == signal.SIGTERM
        if self._asked_to_stop and signum != signal.SIGUSR1:
            self._end()
        self._asked_to_stop = True
        if signum == signal.SIGUSR1:
            self._asked_to_requeue = True
            log.info("stopping after this step, to be requeued")
        else:
            log.info("stopping after this step; once more to stop at once")

    def _end(self) -> NoReturn:
        if self._terminated:
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
