"""Where on the time axis the students still err."""

from __future__ import annotations

from itertools import pairwise

import lightning
import torch
from torch import Tensor
from torchmetrics import Metric

from icd_lightning.data.batch import Batch
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation


class SegmentLosses(lightning.Callback):
    """Log each validation loss by the segment between boundaries that a sample fell in, over all ranks.

    `reverse_cd_by_segment/0-259`, ...: a group for each loss. A segment that no sample fell in is left out.
    """

    def __init__(self) -> None:
        self._means: dict[str, SegmentMeans] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a task without segments."""
        if not isinstance(pl_module, InvertibleConsistencyDistillation):
            raise ValueError(
                f"SegmentLosses needs the losses of two students, and {type(pl_module).__name__} has none: "
                "take it out of trainer.callbacks"
            )
        self._means = {name: SegmentMeans(pl_module.boundaries.num_segments) for name in pl_module.losses}

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        """Begin anew, on the task's device."""
        for means in self._means.values():
            means.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch: Batch, batch_idx, dataloader_idx=0) -> None:
        """Add up what the task returned."""
        for name, means in self._means.items():
            means.update(*outputs[name])

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        """Log the means over all ranks."""
        segments = list(pairwise(pl_module.boundaries.boundary_timesteps))
        for name, means in self._means.items():
            for (lower, upper), value in zip(segments, means.compute().tolist(), strict=True):
                if value == value:  # else no sample fell there, on any rank
                    pl_module.log(f"{name}_by_segment/{lower}-{upper}", value, sync_dist=True)


class SegmentMeans(Metric):
    """The mean of values for each of `count` segments, (count,); NaN where there was none."""

    full_state_update = False
    totals: Tensor
    counts: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(count), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(count), dist_reduce_fx="sum")

    def update(self, values: Tensor, segments: Tensor) -> None:
        """Add values (B,) that fell in segments (B,) long."""
        self.totals.index_add_(0, segments, values.float())
        self.counts.index_add_(0, segments, torch.ones_like(values, dtype=torch.float32))

    def compute(self) -> Tensor:
        return self.totals / self.counts
