"""What callbacks that measure the students in training share: when they look, at what, and where figures go."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from zlib import crc32

import lightning
import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics import Metric

from icd_lightning.callbacks.loggers import PLAIN, log_picture
from icd_lightning.data.batch import Batch
from icd_lightning.data.images import to_pictures
from icd_lightning.editing.consistency import InvertibleConsistency
from icd_lightning.evaluation.report import Panel
from icd_lightning.metrics.registry import build_metrics, expand
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation

CELL = 128  # pixels of a picture in a grid, at least


class StudentEvaluation(lightning.Callback):
    """In each validation, lets a subclass `look` at the first `num_images` pictures of each rank; logs its metrics.

    There is one of each metric for each of `places`, names to log it under over all ranks: "generation/{}" makes
    generation/psnr, and TensorBoard shows together what begins alike. Nothing here touches what a training goes by:
    a picture's noise is drawn from a seed that its key makes, and networks are only evaluated.
    """

    def __init__(self, metrics: Sequence[str], places: Sequence[str], num_images: int, grid_columns: int = 8) -> None:
        for name, value in (("num_images", num_images), ("grid_columns", grid_columns)):
            if value < 1:
                raise ValueError(f"{name} {value} must be 1 or more")
        self.names = expand(metrics, told_by=type(self).__name__)
        self.places, self.num_images = places, num_images
        self.grid_columns = grid_columns
        self.metrics: dict[str, dict[str, Metric]] = {}  # by place and name
        self._seen = 0

    @abstractmethod
    def look(
        self, trainer: lightning.Trainer, task: lightning.LightningModule, batch: Batch, *, seeds: list[int], draw: bool
    ) -> None:
        """Measure a batch of pictures, the noise of each being of its own seed.

        draw: whether these are the first of a validation, to be shown. All ranks come here equally often, and must
        call the networks equally often: spread over devices, they run on all ranks or not at all.
        """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a task without students, and load what the metrics need, before anything is trained."""
        check_students(self, pl_module)
        if not self.metrics:
            self.metrics = {place: dict(build_metrics(self.names)) for place in self.places}

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._seen = 0
        for metrics in self.metrics.values():
            for metric in metrics.values():
                metric.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch: Batch, batch_idx, dataloader_idx=0) -> None:
        """Look at pictures until all ranks have seen enough; their batches may differ in size."""
        if not trainer.strategy.reduce_boolean_decision(self._seen < self.num_images, all=False):
            return
        if batch.images is None:
            raise ValueError(
                f"{type(self).__name__} compares pictures, and the validation data holds latents: "
                "give data.init_args.val_urls shards with pictures, or take it out of trainer.callbacks"
            )
        count = min(len(batch.captions), max(1, self.num_images - self._seen))
        batch = Batch(*(None if part is None else part[:count] for part in batch))
        seeds = [crc32(key.encode()) for key in batch.keys]  # whichever rank and batch a picture is in
        self.look(trainer, pl_module, batch, seeds=seeds, draw=self._seen == 0)
        self._seen += count

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        for place, metrics in self.metrics.items():
            for name, metric in metrics.items():
                logged = place.format(name)
                # sync_dist averages what is equal on all ranks already; without it Lightning warns
                pl_module.log(logged, metric.compute(), prog_bar=logged == PLAIN.format("psnr"), sync_dist=True)

    def measure(self, place: str, results: Tensor, batch: Batch, noise: Tensor) -> None:
        """Give the metrics of a place what there is: results (B, 3, H, W), the batch and the noise they came from."""
        for name in self.names:
            self.metrics[place][name].update(results, batch.images, prompts=batch.captions, noise=noise)

    def draw(self, trainer: lightning.Trainer, name: str, rows: Mapping[str, Tensor], captions: Sequence[str]) -> None:
        """Log a `grid` of the first pictures."""
        shown = {label: images[: self.grid_columns] for label, images in rows.items()}
        log_picture(trainer, name, lambda: grid(shown, captions))


def check_students(callback: lightning.Callback, task: lightning.LightningModule) -> None:
    """ValueError for a task without students."""
    if not isinstance(task, InvertibleConsistencyDistillation):
        raise ValueError(
            f"{type(callback).__name__} needs both students, and {type(task).__name__} has none: "
            "take it out of trainer.callbacks"
        )


def pipeline_of(task: InvertibleConsistencyDistillation) -> InvertibleConsistency:
    return InvertibleConsistency(task.students, task.autoencoder, task.conditioner, task.boundaries)


def grid(rows: Mapping[str, Tensor], captions: Sequence[str]) -> NDArray[np.uint8]:
    """One picture of rows of images (B, 3, H, W) in [-1, 1], labelled at the left, with captions above the columns."""
    from icd_lightning.evaluation.report.canvas import MAX_PICTURE, MIN_LABEL, PICTURE_GAP, draw_body

    pictures = {label: to_pictures(images.float()) for label, images in rows.items()}
    count, _, width = next(iter(pictures.values())).shape[:3]
    heads = tuple(f"\n{caption}" for caption in captions[:count])  # in small letters
    panel = Panel("", "", heads, tuple((label, tuple(shown)) for label, shown in pictures.items()))
    canvas = draw_body(panel, width=MIN_LABEL + count * (MAX_PICTURE + PICTURE_GAP))
    return canvas.pixels(scale=max(width, CELL) / MAX_PICTURE)


def noise_images(noise: Tensor, images: Tensor) -> Tensor:
    """Three channels of noise (B, C, h, w) as colours, as large as images (B, 3, H, W): no picture should show."""
    colors = (noise[:, :3].float() / 3).clamp(-1, 1)  # three standard deviations
    return interpolate(colors, size=images.shape[-2:], mode="nearest")
