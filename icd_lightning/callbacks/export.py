"""Writes what a task has learnt in the formats of other tools."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning

from icd_lightning.models.weights import not_finite

log = logging.getLogger(__name__)


class ExportWeights(lightning.Callback):
    """At the end of a training, let the task write its weights to `folder`, by default the run's own (rank 0 only).

    Raises ValueError, and writes nothing, for weights that are not finite.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if wrong := not_finite(pl_module.trained_parameters().items()):
            raise ValueError(
                f"{wrong} is not finite after step {trainer.global_step}, so nothing is exported: begin anew with a "
                "smaller lr, or precision bf16-mixed, in another trainer.default_root_dir"
            )
        folder = Path(self.folder or trainer.default_root_dir)
        pl_module.export(folder)
        log.info("weights written to %s", folder)
