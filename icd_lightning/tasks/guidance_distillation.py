"""Stage 1: one network that obeys an embedded guidance scale, instead of two evaluations (arXiv:2210.03142)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import NoisedData, guidance_balance, guidance_distillation
from icd_lightning.models.backbone import add_guidance_embedding, cfg_denoiser, guided_denoiser
from icd_lightning.models.cards import write_guided_card
from icd_lightning.models.checkpoints import replaced_folder
from icd_lightning.models.conditioning import Framing
from icd_lightning.models.family import Family
from icd_lightning.models.sources import GUIDED
from icd_lightning.tasks.base import Draws, OptimizerSettings, Task, check_guidance_scales, check_weight


class GuidanceDistillation(Task):
    """The student, the teacher with a guidance embedding, learns || eps(x, t, c, w) - eps_CFG(x, t, c; w) ||^2.

    What it exports is the frozen teacher of stage 2.

    Args:
        family: where the teacher, the autoencoder and the text side come from.
        guidance_scales: the w to learn, drawn evenly; 0 is unconditional, 1 unguided (SD1.5: 1, 8, 12, 16, 20).
        balance: how far the losses at larger w are damped, by `guidance_balance`. Undamped, w = 1 suffers, which the
            student knew from the start.
    """

    def __init__(
        self,
        family: Family,
        guidance_scales: Sequence[float] = (1.0, 8.0, 12.0, 16.0, 20.0),
        *,
        balance: float = 0.0,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerSettings = OptimizerSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.guidance_scales = check_guidance_scales(guidance_scales)
        self.balance = check_weight("balance", balance)
        self.family = family
        self.schedule = family.load_schedule()
        self.autoencoder = family.load_autoencoder()
        self.conditioner = family.load_conditioner()
        self.teacher = family.load_unet(guided=False)
        self.student = add_guidance_embedding(self.teacher).float().requires_grad_(True)  # small steps need float32
        if gradient_checkpointing:
            self.student.enable_gradient_checkpointing()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One w for each sample."""
        draws = self.draws()
        w = draws.choice(len(batch.captions), self.guidance_scales)
        loss = (self.loss(batch, w, draws) * guidance_balance(w, self.balance)).mean()
        self.log_losses(loss, {})
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same noise and timesteps for every w."""
        for scale in self.guidance_scales:
            draws = self.validation_draws(batch_idx)
            w = torch.full((len(batch.captions),), scale, device=self.device)
            self.log(f"val/error_w{scale:g}", self.loss(batch, w, draws).mean(), sync_dist=True)

    def loss(self, batch: Batch, w: Tensor, draws: Draws) -> Tensor:
        """Squared error against the guided teacher at guidance scales w (B,) and uniform timesteps, (B,)."""
        latents = self.latents(batch, draws)
        framing = Framing.of_latents(batch.metadata, latents, self.autoencoder.downsampling)
        conditioning = self.conditioning(batch, framing)
        unconditional = self.conditioner.unconditional(len(latents), framing)
        t = draws.integers(len(latents), self.schedule.num_train_timesteps)
        data = NoisedData(latents, draws.normal(*latents.shape), self.schedule)
        teacher = cfg_denoiser(self.teacher, self.schedule, conditioning, unconditional, w)
        student = guided_denoiser(self.student, self.schedule, conditioning, w)
        return guidance_distillation(student, teacher, data, t)

    def recipe(self) -> dict[str, Any]:
        """The w learned, and how they are weighed."""
        return {"guidance_scales": list(self.guidance_scales), "balance": self.balance}

    def export(self, folder: Path) -> None:
        """Write the student in diffusers' layout, where `Family(guided_unet=...)` finds it, with a card."""
        with replaced_folder(folder / GUIDED) as temporary:
            self.student.save_pretrained(temporary)
        settings = {
            "family": self.family.model,
            **self.recipe(),
            "steps": self.global_step,
            "optimizer": asdict(self.optimizer_settings),
            "seed": self.seed,
        }
        write_guided_card(folder / GUIDED, settings)
