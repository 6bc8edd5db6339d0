"""Training of a tiny family's teacher: a text-to-image latent diffusion model from nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import Draws, Process, classifier_free_guidance, guidance_balance, squared_error
from icd_lightning.files import write_json
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.text import CLIPConditioner, Conditioner, build_tokenizer
from icd_lightning.tasks.base import OptimizerSettings, Task, check_guidance_scales, check_not_negative, drop_captions
from icd_lightning.tiny.scenes import vocabulary


class TeacherTraining(Task):
    """Denoising with captions, on latents of a frozen autoencoder.

    A network that takes w is told one for each sample, and learns the guided output at once: to the target it adds
    what guidance adds to the network's own output at w = 1, held (arXiv:2502.12154, Eq. 12).

    Args:
        family: whose autoencoder, backbone and, unless there is a `text_encoder`, text side are taken; they stay as
            they are.
        network: config of the backbone's network.
        scheduler: config of the process, with its class if it is not diffusers' DDIMScheduler.
        text_encoder: config of a CLIPTextModel to train too; its vocabulary and special tokens are the picture world's.
        caption_dropout: share of captions replaced by the empty one, for classifier-free guidance.
        guidance_scales: the w to draw from, for a network that takes w; one that stands there twice is drawn as often.
        balance: as in `GuidanceDistillation`.
    """

    def __init__(
        self,
        family: Family,
        network: dict,
        scheduler: dict,
        *,
        text_encoder: dict | None = None,
        caption_dropout: float = 0.1,
        guidance_scales: Sequence[float] = (1.0,),
        balance: float = 0.5,
        optimizer: OptimizerSettings = OptimizerSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.family = family
        self.autoencoder = family.load_autoencoder()
        self.process = Process.from_config(scheduler)
        self.scheduler = getattr(diffusers, scheduler.get("_class_name", "DDIMScheduler")).from_config(scheduler)
        self.caption_dropout = caption_dropout
        self.guidance_scales = check_guidance_scales(guidance_scales)
        self.balance = check_not_negative("balance", balance)
        torch.manual_seed(seed)
        self.trains_text = text_encoder is not None
        self.text_side = family.load_conditioner() if text_encoder is None else _new_text_side(text_encoder)
        self.network = family.architecture.network_class.from_config(network)

    @property
    def conditioner(self) -> Conditioner:
        """Trained with the network, or frozen."""
        return self.text_side

    def diffusion_models(self) -> list[DiffusionModel]:
        return [DiffusionModel(self.network, self.process, self.family.architecture)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        draws = self.draws()
        captions = drop_captions(batch.captions, self.caption_dropout, draws)
        loss = self.loss(batch, captions, draws, self.guidance_scales).mean()
        self.log_losses(loss, {})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch, batch.captions, self.validation_draws(batch_idx), (1.0,)).mean()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True)

    def loss(self, batch: Batch, captions: list[str], draws: Draws, scales: Sequence[float]) -> Tensor:
        """Squared error of the network's output (eps, v or a velocity) at random timesteps, (B,)."""
        latents = self.latents(batch, draws)
        noise = draws.normal(*latents.shape)
        t = self._timesteps(len(latents), draws)
        (model,), conditioning = self.diffusion_models(), self.conditioner(captions)
        x, target = self.process.add_noise(latents, noise, t), self.process.target(latents, noise, t)
        if not model.takes_guidance:
            return squared_error(model.predict(x, t, conditioning, None), target)
        w = draws.choice(len(latents), scales)
        if len(rows := (w != 1).nonzero().squeeze(1)):
            target[rows] += self._added(x[rows], t[rows], conditioning[rows], w[rows])
        return squared_error(model.predict(x, t, conditioning, w), target) * guidance_balance(w, self.balance)

    @torch.no_grad()
    def _added(self, x: Tensor, t: Tensor, conditioning: Conditioning, w: Tensor) -> Tensor:
        """What classifier-free guidance at w (B,) adds to the network's output (B, C, H, W) at w = 1."""
        (model,) = self.diffusion_models()
        both = Conditioning.cat([conditioning, self.conditioner.unconditional(len(x))])
        unguided = torch.ones_like(w).repeat(2)
        conditional, unconditional = model.predict(x.repeat(2, 1, 1, 1), t.repeat(2), both, unguided).chunk(2)
        return classifier_free_guidance(unconditional, conditional, w) - conditional

    def _timesteps(self, count: int, draws: Draws) -> Tensor:
        """A third each: uniform; where the caption's words show, a logit-normal (arXiv:2403.03206, 3.1); near the data.

        Where latents vary little, noise must be found while it is small, or what DDIM encodes to is less than noise:
        each step multiplies what the one before left behind.
        """
        uniform, middle = draws.uniform(count), torch.sigmoid(0.6 + 1.1 * draws.normal(count))
        kinds = torch.stack([uniform, middle, 0.4 * uniform**2])
        share = kinds.gather(0, draws.integers(count, len(kinds))[None])[0]
        total = self.process.num_train_timesteps
        return (share * total).long().clamp(max=total - 1)

    def export(self, folder: Path) -> None:
        """Write all that was trained, in diffusers' layout; with another family's text side, as an overlay of it."""
        self.network.save_pretrained(folder / self.family.architecture.part)
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.trains_text:
            self.conditioner.text_encoder.save_pretrained(folder / "text_encoder")
            self.conditioner.tokenizer.save_pretrained(folder / "tokenizer")
            return
        base = self.family.model
        side = Family(base).resolution // self.autoencoder.downsampling
        write_json(folder / "model_index.json", {"base_model": base, "sample_size": side})


def _new_text_side(config: dict) -> CLIPConditioner:
    """A text encoder of random weights, to which each word of the picture world is a token."""
    tokenizer = build_tokenizer(vocabulary(), config["max_position_embeddings"])
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPConditioner(tokenizer, CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **special, **config)))
