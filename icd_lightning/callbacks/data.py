"""What became of the data that a training read."""

from __future__ import annotations

import logging
import math

import lightning
import torch

from icd_lightning.data.tally import Tally, left_out

log = logging.getLogger(__name__)


class DataReport(lightning.Callback):
    """Logs how many samples passed and how many were skipped, by reason, over all ranks since the run was (re)started.

    They are `data/train/passed`, `data/train/too_small` ...; a reason appears once it has been met; validation's are
    `data/val/...`. A data module that does not count (`train_tally`, `val_tally`) is let be.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say where the last optimizer step of an epoch takes fewer micro-batches than are accumulated."""
        batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
        if trainer.is_global_zero and math.isfinite(batches) and (rest := batches % accumulated):
            text = "an epoch has %d batches: its last optimizer step takes %d of the %d that are accumulated"
            log.warning(text, batches, rest, accumulated)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        every, stepped = trainer.log_every_n_steps, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if every and stepped and trainer.global_step % every == 0:
            for split, counts in _counts(trainer, pl_module).items():
                metrics = {f"data/{split}/{name}": n for name, n in counts.items() if n}
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, trainer.global_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for split, counts in _counts(trainer, pl_module).items():
            if trainer.is_global_zero and (skipped := left_out(counts)):
                log.warning("%s data: %d samples passed, left out: %s", split, counts["passed"], skipped)


def _counts(trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> dict[str, dict[str, int]]:
    """Sum the counts of all ranks; every rank must ask."""
    summed = {}
    for split in ("train", "val"):
        tally = getattr(trainer.datamodule, f"{split}_tally", None)
        if isinstance(tally, Tally):
            own = tally.counts()
            total = trainer.strategy.reduce(torch.tensor([*own.values()], device=pl_module.device), reduce_op="sum")
            summed[split] = dict(zip(own, total.tolist(), strict=True))
    return summed
