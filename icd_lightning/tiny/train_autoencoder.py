"""Training of the tiny family's autoencoder. Larger families bring their own."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderDC
from torch import Tensor

from icd_lightning.data.batch import Batch
from icd_lightning.metrics.reconstruction import psnr
from icd_lightning.tasks.base import OptimizerSettings, Task


class AutoencoderTraining(Task):
    """L1 + L2 on pixels, with a little noise on the latents so that the decoder forgives, and latents held standard.

    Args:
        vae: config of diffusers' AutoencoderDC.
        latent_noise: standard deviation of the noise added to latents before decoding.
        moment_weight: weight of the penalty on each channel's mean and log standard deviation.
    """

    def __init__(
        self,
        vae: dict,
        *,
        latent_noise: float = 0.05,
        moment_weight: float = 0.01,
        optimizer: OptimizerSettings = OptimizerSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.vae = AutoencoderDC.from_config(vae)
        self.latent_noise, self.moment_weight = latent_noise, moment_weight

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        latents = self.vae.encode(batch.images).latent
        noise = self.draws().normal(*latents.shape)
        error = self.vae.decode(latents + self.latent_noise * noise).sample - batch.images
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        losses = {
            "l1": error.abs().mean(),
            "l2": error.square().mean(),
            "moments": mean.square().mean() + std.log().square().mean(),
        }
        total = losses["l1"] + losses["l2"] + self.moment_weight * losses["moments"]
        self.log_losses(total, losses)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        latents = self.vae.encode(batch.images).latent
        images = self.vae.decode(latents).sample.clamp(-1, 1)
        self.log("val/psnr", psnr(images, batch.images).mean(), prog_bar=True, sync_dist=True)
        self.log("val/latent_std", latents.std(), sync_dist=True)

    def export(self, folder: Path) -> None:
        """Write the autoencoder in diffusers' layout; its scaling factor is 1: training held the latents standard."""
        self.vae.save_pretrained(folder / "vae")
