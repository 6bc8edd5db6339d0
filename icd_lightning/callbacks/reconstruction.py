"""How well the students take pictures to noise and back, looked at during training."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
from torchmetrics import MeanMetric

from icd_lightning.callbacks.evaluation import StudentEvaluation, noise_images, pipeline_of
from icd_lightning.callbacks.loggers import GUIDED, PLAIN, SWEPT
from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import StepGuidance
from icd_lightning.editing.method import UNGUIDED, seeded_noise


class ReconstructionCallback(StudentEvaluation):
    """Invert and generate validation pictures; log what came back, over all ranks, unguided and as the task decodes.

    `reconstruction/<metric>` is at w = 1, `reconstruction_guided/<metric>` with the task's `decoding`; `latent_mse` is
    the mean squared error of the latents. A grid of pictures is logged: originals, the noise that they were
    inverted to, what came back of it, and pictures generated from drawn noise.

    Args:
        metrics: names of metrics.registry, e.g. psnr, ssim, lpips, dinov2; or the presets tiny and icd. Those with
            pretrained networks load the real ones or end the run early.
        num_images: pictures of each rank to look at in a validation.
        grid_columns: pictures in a row of the grid.
    """

    def __init__(
        self, metrics: Sequence[str] = ("psnr", "ssim"), *, num_images: int = 32, grid_columns: int = 8
    ) -> None:
        super().__init__(metrics, (PLAIN, GUIDED), num_images, grid_columns)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        for metrics in self.metrics.values():
            metrics.setdefault("latent_mse", MeanMetric())

    def look(self, trainer: lightning.Trainer, task, batch: Batch, *, seeds: list[int], draw: bool) -> None:
        pipeline = pipeline_of(task)
        noise = pipeline.invert(batch.images, batch.captions, seed=seeds)
        latents = task.autoencoder.encode(batch.images)
        rows = {"original": batch.images, "its noise": noise_images(noise, batch.images)}
        for place, guidance in ((PLAIN, UNGUIDED), (GUIDED, task.decoding)):
            result = pipeline.generate(batch.captions, noise, guidance=guidance)
            self.measure(place, result, batch, noise)
            self.metrics[place]["latent_mse"].update((task.autoencoder.encode(result) - latents).square())
            rows[f"back, w {guidance.guidance_scale:g}"] = result
        if draw:
            drawn = seeded_noise(noise.shape, seeds, noise.device)
            rows["generated"] = pipeline.generate(batch.captions, drawn, guidance=task.decoding)
            self.draw(trainer, "pictures/inversion", rows, batch.captions)


class GuidanceSweep(StudentEvaluation):
    """Reconstruct validation pictures at several w, dynamic as the task decodes: `guidance_sweep/<metric>_w<w>`.

    Args:
        guidance_scales: the w to decode with; 1 is unguided.
        metrics: see ReconstructionCallback.
        num_images: pictures of each rank to look at in a validation.
    """

    def __init__(
        self, guidance_scales: Sequence[float], metrics: Sequence[str] = ("psnr",), *, num_images: int = 16
    ) -> None:
        if not guidance_scales or min(guidance_scales) < 1:
            raise ValueError(f"guidance_scales {list(guidance_scales)} must be 1 (unguided) or more, and at least one")
        self._scales = {SWEPT.format(w): w for w in guidance_scales}
        super().__init__(metrics, tuple(self._scales), num_images)

    def look(self, trainer: lightning.Trainer, task, batch: Batch, *, seeds: list[int], draw: bool) -> None:
        pipeline = pipeline_of(task)
        noise = pipeline.invert(batch.images, batch.captions, seed=seeds)
        for place, w in self._scales.items():
            result = pipeline.generate(batch.captions, noise, guidance=StepGuidance(w, task.decoding.tau))
            self.measure(place, result, batch, noise)
