"""How well the students take pictures to noise and back, looked at during training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
from torch import Tensor, nn
from torchmetrics import MeanMetric

from icd_lightning.callbacks.pictures import log_grid
from icd_lightning.data.batch import Batch
from icd_lightning.editing.method import UNGUIDED, seeded_noise
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation


class ReconstructionCallback(lightning.Callback):
    """Invert and generate validation pictures; log what came back, over all ranks, unguided and as the task decodes.

    `reconstruction/<metric>` is at w = 1, `reconstruction_guided/<metric>` with the task's `decoding`. A grid of
    pictures goes to TensorBoard: original, reconstructed, reconstructed guided, generated from drawn noise.

    Args:
        metrics: any of psnr, ssim, and lpips, dinov2, fid, which load real pretrained networks or end the run early.
        num_images: pictures of each rank to look at in a validation.
        grid_columns: pictures in a row of the grid.
    """

    def __init__(
        self, metrics: Sequence[str] = ("psnr", "ssim"), *, num_images: int = 32, grid_columns: int = 8
    ) -> None:
        if min(num_images, grid_columns) < 1:
            raise ValueError(f"num_images {num_images} and grid_columns {grid_columns} must be 1 or more")
        self.num_images, self.grid_columns = num_images, grid_columns
        self.metrics = {name: self._metrics(metrics) for name in ("reconstruction", "reconstruction_guided")}
        self._seen = 0

    @staticmethod
    def _metrics(names: Sequence[str]) -> nn.ModuleDict:
        return nn.ModuleDict({**build_metrics(names), "latent_mse": MeanMetric()})

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a task without students."""
        if not isinstance(pl_module, InvertibleConsistencyDistillation):
            raise ValueError(
                f"ReconstructionCallback needs both students, and {type(pl_module).__name__} has none: "
                "take it out of trainer.callbacks"
            )

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        """Begin anew, on the task's device."""
        self._seen = 0
        for group in self.metrics.values():
            for metric in group.to(pl_module.device).values():
                metric.reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch: Batch, batch_idx, dataloader_idx=0) -> None:
        """Reconstruct pictures until there are enough."""
        count = min(len(batch.captions), self.num_images - self._seen)
        if count <= 0:
            return
        images, captions = batch.images[:count], batch.captions[:count]
        pipeline = pipeline_of(pl_module)
        noise = pipeline.invert(images, captions, seed=self._seen)
        results = {
            name: pipeline.generate(captions, noise, guidance=guidance)
            for name, guidance in zip(self.metrics, (UNGUIDED, pl_module.decoding), strict=True)
        }
        latents = pl_module.autoencoder.encode(images)
        for name, result in results.items():
            self._update(self.metrics[name], result, images, pl_module.autoencoder.encode(result) - latents)
        if self._seen == 0:
            self._draw(trainer, pl_module, images, captions, list(results.values()))
        self._seen += count

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        """Log the means over all ranks."""
        for name, group in self.metrics.items():
            for metric_name, metric in group.items():
                shown = (name, metric_name) == ("reconstruction", "psnr")
                # sync_dist averages what is equal on all ranks already; without it Lightning warns
                pl_module.log(f"{name}/{metric_name}", metric.compute(), prog_bar=shown, sync_dist=True)

    @staticmethod
    def _update(group: nn.ModuleDict, result: Tensor, images: Tensor, latent_error: Tensor) -> None:
        for name, metric in group.items():
            if name == "latent_mse":
                metric.update(latent_error.square())
            else:
                metric.update(result, images)

    def _draw(self, trainer, task, images: Tensor, captions: list[str], results: list[Tensor]) -> None:
        count = min(self.grid_columns, len(images))
        pipeline = pipeline_of(task)
        noise = seeded_noise(pipeline.latent_shape(count, *images.shape[-2:]), 0, images.device)
        generated = pipeline.generate(captions[:count], noise, guidance=task.decoding)
        rows = [row[:count] for row in (images, *results, generated)]
        log_grid(trainer, "original, reconstructed, guided, generated", rows)
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_text") and trainer.is_global_zero:
                logger.experiment.add_text("captions", "  \n".join(captions[:count]), trainer.global_step)


def pipeline_of(task: InvertibleConsistencyDistillation) -> InvertibleConsistencyPipeline:
    """The pipeline over the very students in training."""
    return InvertibleConsistencyPipeline(task.students, task.autoencoder, task.conditioner, task.boundaries)
