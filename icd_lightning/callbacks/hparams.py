"""A run as one row of TensorBoard's HPARAMS table: its settings, and what came of them."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from icd_lightning.callbacks.loggers import CATEGORIES, FINAL

SETTINGS = ("model", "data", "seed_everything")
MEASURED = CATEGORIES.keys() - {"train"}


class FinalMetrics(lightning.Callback):
    """At the end of a training, log the settings of its configuration with the final metrics, as `final/<metric>`.

    Other loggers than TensorBoard's get the settings alone: they know the last value of a metric by themselves.
    """

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics = {FINAL.format(name): value for name, value in values.items() if name.split("/")[0] in MEASURED}
        if not metrics or not trainer.is_global_zero:
            return
        settings = {"max_steps": trainer.max_steps}
        for callback in trainer.callbacks:
            if isinstance(callback, SaveConfigCallback):
                config = callback.config.as_dict()
                for name in SETTINGS:
                    settings |= _flat(config.get(name, {}), name)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings, metrics, trainer.global_step)
            else:
                logger.log_hyperparams(settings)


def _flat(value: Any, key: str) -> dict[str, Any]:
    """What a part of the configuration says, by dotted key."""
    if not isinstance(value, dict):
        return {key.replace(".init_args", ""): value}
    parts = (_flat(below, f"{key}.{name}") for name, below in value.items())
    return {name: value for part in parts for name, value in part.items()}
