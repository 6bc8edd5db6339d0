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
        self._throughput = Throughput()
        self._next_line = 0.0
        self._last_step = math.inf
        if not sys.stdout.isatty():
            self.disable()  # a bar drawn into a file is noise

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._throughput.restart(trainer.global_step)
        self._last_step = pl_module.total_steps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Update the bar, or write a line."""
        self._throughput.add(len(batch.captions) * trainer.world_size)
        pl_module.log("throughput/images_per_second", self._throughput.rate)
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
        """Stop the clock."""
        super().on_validation_start(trainer, pl_module)
        self._throughput.pause()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Go on."""
        super().on_validation_end(trainer, pl_module)
        self._throughput.go_on()

    def get_metrics(self, trainer, pl_module) -> dict:
        """The logged ones, the throughput and the time left, without the run's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        left = self._throughput.seconds_left(trainer.global_step, self._last_step)
        return {**metrics, "images/s": self._throughput.rate, "left": _clock(left)}

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"  # of a run that counts steps Lightning would write "Epoch 0/-2"


class Throughput:
    """Images a second since the training, or this part of it, began; the pauses are not counted."""

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        self.first_step, self.images, self.start = step, 0, time.monotonic()
        self.paused, self.pause_start = 0.0, self.start

    def pause(self) -> None:
        self.pause_start = time.monotonic()

    def go_on(self) -> None:
        self.paused += time.monotonic() - self.pause_start

    def add(self, images: int) -> None:
        self.images += images

    @property
    def rate(self) -> float:
        return self.images / max(1e-6, time.monotonic() - self.start - self.paused)

    def seconds_left(self, step: int, last: float) -> float:
        """Until the last step, with validations as often as so far."""
        done = max(1, step - self.first_step)
        return (last - step) * (time.monotonic() - self.start) / done


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "for ever"
    minutes, rest = divmod(round(max(0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
