"""Training of the tiny family's teacher: a text-to-image latent diffusion model from nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import Process
from icd_lightning.diffusion.losses import squared_error
from icd_lightning.models.backbones import UNet
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import load_autoencoder
from icd_lightning.models.text import CLIPConditioner, build_tokenizer
from icd_lightning.tasks.base import Draws, OptimizerSettings, Task, drop_captions
from icd_lightning.tiny.scenes import vocabulary


class TeacherTraining(Task):
    """Denoising with captions: UNet and text encoder together, on latents of a frozen autoencoder.

    Args:
        vae: folder of the autoencoder, in diffusers' layout.
        unet: config of diffusers' UNet2DConditionModel.
        text_encoder: config of transformers' CLIPTextModel; vocabulary and special tokens come from the picture world.
        scheduler: config of the noise schedule, with its prediction type.
        caption_dropout: share of captions replaced by the empty one, for classifier-free guidance.
    """

    def __init__(
        self,
        vae: str,
        unet: dict,
        text_encoder: dict,
        scheduler: dict,
        *,
        caption_dropout: float = 0.1,
        optimizer: OptimizerSettings = OptimizerSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.autoencoder = load_autoencoder(Path(vae))
        self.process = Process.from_config(scheduler)
        self.scheduler_config = scheduler
        self.caption_dropout = caption_dropout
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(vocabulary(), text_encoder["max_position_embeddings"])  # a word is a token
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = CLIPTextConfig(vocab_size=len(tokenizer), **special, **text_encoder)
        self.conditioner = CLIPConditioner(tokenizer, CLIPTextModel(config))
        self.unet = UNet2DConditionModel.from_config(unet)

    def diffusion_models(self) -> list[DiffusionModel]:
        """The teacher."""
        return [DiffusionModel(self.unet, self.process, UNet())]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws = self.draws()
        captions = drop_captions(batch.captions, self.caption_dropout, draws)
        loss = self.loss(batch, captions, draws).mean()
        self.log_losses(loss, {})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch, batch.captions, self.validation_draws(batch_idx)).mean()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def loss(self, batch: Batch, captions: list[str], draws: Draws) -> Tensor:
        """Squared error of the network's output (eps or v) at random timesteps, (B,)."""
        latents = self.latents(batch, draws)
        noise = draws.normal(*latents.shape)
        t = self._timesteps(len(latents), draws)
        (model,) = self.diffusion_models()
        output = model.predict(self.process.add_noise(latents, noise, t), t, self.conditioner(captions), None)
        return squared_error(output, self.process.target(latents, noise, t))

    def _timesteps(self, count: int, draws: Draws) -> Tensor:
        """A third each: uniform; where the caption's words show, a logit-normal (arXiv:2403.03206, 3.1); near the data.

        The latents of so plain a world lie near a thin sheet. Noise off the sheet must be found while it is small, or
        what DDIM encodes to is less than noise: each step multiplies what the one before left behind.
        """
        uniform, middle = draws.uniform(count), torch.sigmoid(0.6 + 1.1 * draws.normal(count))
        kinds = torch.stack([uniform, middle, 0.4 * uniform**2])
        share = kinds.gather(0, draws.integers(count, len(kinds))[None])[0]
        total = self.process.num_train_timesteps
        return (share * total).long().clamp(max=total - 1)

    def export(self, folder: Path) -> None:
        """Write all but the autoencoder, in diffusers' layout."""
        self.unet.save_pretrained(folder / "unet")
        self.conditioner.text_encoder.save_pretrained(folder / "text_encoder")
        self.conditioner.tokenizer.save_pretrained(folder / "tokenizer")
        DDIMScheduler.from_config(self.scheduler_config).save_pretrained(folder / "scheduler")
