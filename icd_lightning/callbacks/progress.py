"""What a person sees while a training runs."""

from __future__ import annotations

import logging
import math
import sys
import time

import lightning
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

log = logging.getLogger(__name__)


class TrainingProgress(RichProgressBar):
    """A bar with loss, images a second and time left; where there is no terminal, one line every `every_seconds`.

    Images a second of training, validations left out, are logged too, as `throughput/images_per_second`.
    """

    def __init__(self, every_seconds: float = 30.0) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".4g"), leave=True)
        self.every_seconds = every_seconds
        self._next_line = 0.0
        self._restart(0, math.inf)
        if not sys.stdout.isatty():
            self.disable()  # a bar drawn into a file is noise

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart(trainer.global_step, pl_module.total_steps)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._images += len(batch.captions) * trainer.world_size
        pl_module.log("throughput/images_per_second", self._rate())
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        now = time.monotonic()
        if self.is_disabled and now >= self._next_line and trainer.is_global_zero:
            self._next_line = now + self.every_seconds
            metrics = self.get_metrics(trainer, pl_module).items()
            shown = "  ".join(
                f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in metrics
            )
            log.info("step %d/%s  %s", trainer.global_step, self._last_step, shown)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._validation_start = time.monotonic()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._validating += time.monotonic() - self._validation_start

    def get_metrics(self, trainer, pl_module) -> dict:
        """The logged ones, the throughput and the time left, without the run's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**metrics, "images/s": self._rate(), "left": _clock(self._seconds_left(trainer.global_step))}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"  # of a run that counts steps Lightning would write "Epoch 0/-2"

    def _restart(self, step: int, last_step: float) -> None:
        """Count from where the training, or this part of it, begins."""
        self._first_step, self._last_step, self._images = step, last_step, 0
        self._start, self._validating = time.monotonic(), 0.0

    def _rate(self) -> float:
        return self._images / max(1e-6, time.monotonic() - self._start - self._validating)

    def _seconds_left(self, step: int) -> float:
        """Until the last step, with validations as often as so far."""
        done = max(1, step - self._first_step)
        return (self._last_step - step) * (time.monotonic() - self._start) / done


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "for ever"
    minutes, rest = divmod(round(max(0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
