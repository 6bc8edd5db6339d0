"""How well the students take pictures to noise and back, looked at during training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from icd_lightning.callbacks.pictures import log_grid
from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.pipeline import InvertibleConsistencyPipeline
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tasks.invertible_consistency import InvertibleConsistencyDistillation


class ReconstructionCallback(lightning.Callback):
    """Invert and generate validation pictures, and log what came back as `reconstruction/<metric>` (all ranks together).

    Args:
        metrics: any of psnr, ssim, and lpips, dinov2, fid, which load real pretrained networks or end the run early.
        num_images: pictures of each rank to look at in a validation.
        guidance_scale, tau: the guided decoding shown in the picture grid.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("psnr", "ssim"),
        *,
        num_images: int = 64,
        grid_columns: int = 8,
        guidance_scale: float = 3.0,
        tau: float = 0.8,
    ) -> None:
        self.metrics = nn.ModuleDict(build_metrics(metrics))
        self.latent_mse = MeanMetric()
        self.num_images, self.grid_columns = num_images, grid_columns
        self.guidance = StepGuidance(guidance_scale, tau)
        self._seen = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse a task without students; metrics follow the task's device."""
        if not isinstance(pl_module, InvertibleConsistencyDistillation):
            raise ValueError(f"ReconstructionCallback needs both students; {type(pl_module).__name__} has none: leave it out")

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        """Begin anew."""
        self._seen = 0
        for metric in (*self.metrics.values(), self.latent_mse):
            metric.to(pl_module.device).reset()

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch: Batch, batch_idx, dataloader_idx=0) -> None:
        """Reconstruct pictures until there are enough."""
        count = min(len(batch.captions), self.num_images - self._seen)
        if count <= 0:
            return
        images, captions = batch.images[:count], batch.captions[:count]
        pipeline = pipeline_of(pl_module)
        noise = pipeline.invert(images, captions, seed=self._seen)
        result = pipeline.generate(captions, noise)
        self.latent_mse.update((pl_module.autoencoder.encode(result) - pl_module.autoencoder.encode(images)).square())
        for metric in self.metrics.values():
            metric.update(result, images)
        if self._seen == 0:
            self._draw(trainer, pipeline, images, captions, noise, result)
        self._seen += count

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        """Log the means over all ranks."""
        for name, metric in {**self.metrics, "latent_mse": self.latent_mse}.items():
            pl_module.log(f"reconstruction/{name}", metric.compute(), prog_bar=name == "psnr", rank_zero_only=False)

    def _draw(self, trainer, pipeline, images: Tensor, captions: Sequence[str], noise: Tensor, result: Tensor) -> None:
        columns = min(self.grid_columns, len(images))
        guided = pipeline.generate(captions[:columns], noise[:columns], guidance=self.guidance)
        drawn = torch.randn(noise[:columns].shape, generator=torch.Generator().manual_seed(0)).to(noise)
        generated = pipeline.generate(captions[:columns], drawn, guidance=self.guidance)
        rows = [images[:columns], result[:columns], guided, generated]
        log_grid(trainer, "pictures/original, reconstructed, guided, generated", rows)


def pipeline_of(task: InvertibleConsistencyDistillation) -> InvertibleConsistencyPipeline:
    """The pipeline over the very students in training."""
    return InvertibleConsistencyPipeline(task.students, task.autoencoder, task.conditioner, task.boundaries)
