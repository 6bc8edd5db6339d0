"""Where on the time axis the students still err."""

from __future__ import annotations

from itertools import chain, pairwise

import lightning
from torchmetrics import MeanMetric

from icd_lightning.callbacks.evaluation import check_students
from icd_lightning.data.batch import Batch


class SegmentLosses(lightning.Callback):
    """Log each validation loss by the segment between boundaries that a sample fell in, over all ranks.

    `reverse_cd_by_segment/0-259`, ...: a group for each loss. A segment that no sample fell in is left out.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[MeanMetric]] = {}  # of each loss, by segment

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        check_students(self, pl_module)
        segments = range(pl_module.boundaries.num_segments)
        self._means = {name: [MeanMetric(nan_strategy="disable") for _ in segments] for name in pl_module.losses}

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        for mean in chain(*self._means.values()):
            mean.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch: Batch, batch_idx, dataloader_idx=0) -> None:
        for name, means in self._means.items():
            for segment, mean in enumerate(means):
                mean.update(outputs[name].values[outputs[name].segments == segment])

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        segments = list(pairwise(pl_module.boundaries.boundary_timesteps))
        for name, means in self._means.items():
            for (lower, upper), mean in zip(segments, means, strict=True):
                value = mean.compute()
                if not value.isnan():  # else no sample fell there, on any rank
                    pl_module.log(f"{name}_by_segment/{lower}-{upper}", value, sync_dist=True)
