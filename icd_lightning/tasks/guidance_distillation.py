"""Stage 1: one network that obeys an embedded guidance scale, instead of two evaluations (arXiv:2210.03142)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import Draws, NoisedData, guidance_balance, guidance_distillation
from icd_lightning.files import replaced_folder
from icd_lightning.models.cards import write_guided_card
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.models.weights import fingerprint
from icd_lightning.tasks.base import OptimizerSettings, Task, check_guidance_scales, check_not_negative


class GuidanceDistillation(Task):
    """The student, the teacher with a guidance embedding, learns || f(x, t, c, w) - f_CFG(x, t, c; w) ||^2.

    f is what the network outputs: eps, v or a velocity.
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
        self.balance = check_not_negative("balance", balance)
        self.family = family
        if family.quantization is not None:
            raise ValueError(
                f"family.quantization {family.quantization} is of frozen weights, and stage 1 trains a whole network "
                "beside its teacher: leave it out here, and give it to stage 2"
            )
        self.autoencoder = family.load_autoencoder()
        # small steps need float32, and the student begins as the teacher was saved, not as it is rounded to run
        teacher = replace(family, precision="float32").load_model(guided=False)
        self._teacher = fingerprint(teacher.network, most=4096)
        self.process, self.backbone = teacher.process, teacher.backbone
        self.student = teacher.with_guidance_embedding().network.requires_grad_(True)
        self.teacher = nn.Module.to(teacher.network, family.dtype)  # diffusers' own `to` warns of what is not so
        if gradient_checkpointing:
            self.student.enable_gradient_checkpointing()

    def diffusion_models(self) -> list[DiffusionModel]:
        return [DiffusionModel(network, self.process, self.backbone) for network in (self.teacher, self.student)]

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
        latents, conditioning, framing = self.encoded(batch, draws)
        unconditional = self.unconditional(framing)
        t = draws.integers(len(latents), self.process.num_train_timesteps)
        data = NoisedData(latents, draws.normal(*latents.shape), self.process)
        teacher, student = (model.denoiser(conditioning, w, unconditional) for model in self.diffusion_models())
        return guidance_distillation(student, teacher, data, t)

    def recipe(self) -> dict[str, Any]:
        return {
            "guidance_scales": list(self.guidance_scales),
            "balance": self.balance,
            "teacher": self._teacher,
            "process": self.process.settings,
        }

    def export(self, folder: Path) -> None:
        """Write the student in diffusers' layout, where `Family(guided_unet=...)` finds it, with a card."""
        guided = folder / f"{self.backbone.part}_guided"
        with replaced_folder(guided) as temporary:
            self.student.save_pretrained(temporary)
        write_guided_card(guided, self.about())
