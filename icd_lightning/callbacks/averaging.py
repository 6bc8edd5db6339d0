"""Averages of the weights in training."""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from icd_lightning.models.sharding import gathered, part_like

log = logging.getLogger(__name__)


class ExponentialAverage(lightning.Callback):
    """Validate and export an exponential moving average of the trained weights, updated after every step.

    Of the trained weights alone, spread over devices as they are: Lightning's WeightAveraging copies the whole task, a
    second frozen base included. Checkpoints are as it writes them: the average in `state_dict`, what is trained on in
    `current_model_state`.

    Args:
        decay: how much of the average stays at each step.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay {decay} must lie between 0 and 1")
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._averaged_step = 0
        self._in_place = False  # whether the task holds the averages, and `_averages` what is trained

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Follow the weights to their device, and go on with those of the checkpoint, if any."""
        self._averaged_step = trainer.global_step
        for name, parameter in pl_module.trained_parameters().items():
            if name in self._averages:
                self._averages[name] = self._averages[name].to(parameter.device)
        self._place_averages(pl_module, False)

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Average, if this was the last micro-batch of a step."""
        if trainer.global_step == self._averaged_step:
            return
        self._averaged_step = trainer.global_step
        for name, parameter in pl_module.trained_parameters().items():
            if name in self._averages:
                self._averages[name].lerp_(parameter, 1 - self.decay)
            else:  # the first step
                self._averages[name] = parameter.detach().clone()

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        """Put the averages in the place of the weights; after a training they are there already."""
        self._place_averages(pl_module, True)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._place_averages(pl_module, False)

    def on_train_end(self, trainer, pl_module) -> None:
        """Leave the averages in place, to be exported."""
        self._place_averages(pl_module, True)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        """Save the averages beside the weights; all processes come here."""
        if not self._averages:
            return
        in_task, aside = checkpoint["state_dict"], gathered(self._averages)
        averages, current = (in_task, aside) if self._in_place else (aside, in_task)
        checkpoint["state_dict"] = {**in_task, **averages}
        checkpoint["current_model_state"] = {**in_task, **current}
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._averaged_step)}

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained aside: the task holds the averages, which is all that a finished run needs."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if "current_model_state" not in checkpoint:
            log.warning("the checkpoint was made without averaging: averages begin at its weights")
        current = checkpoint.get("current_model_state", checkpoint["state_dict"])
        self._averages = {n: part_like(current[n], p).clone() for n, p in pl_module.trained_parameters().items()}
        self._in_place = True

    @torch.no_grad()
    def _place_averages(self, pl_module: lightning.LightningModule, in_place: bool) -> None:
        if not self._averages or self._in_place == in_place:
            return
        self._in_place = in_place
        for name, parameter in pl_module.trained_parameters().items():
            here = parameter.detach().clone()
            parameter.copy_(self._averages[name])
            self._averages[name].copy_(here)
