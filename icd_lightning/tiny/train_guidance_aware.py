"""A teacher made ready for stage 1: its own network can hold its guided predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icd_lightning.data.batch import Batch
from icd_lightning.diffusion import classifier_free_guidance, guidance_balance
from icd_lightning.diffusion.losses import squared_error
from icd_lightning.files import replaced_folder
from icd_lightning.models.backbones import UNet
from icd_lightning.models.conditioning import Conditioning
from icd_lightning.models.diffusion_model import DiffusionModel
from icd_lightning.models.family import Family
from icd_lightning.tasks.base import Draws, OptimizerSettings, Task, check_guidance_scales, check_not_negative


class GuidanceAwareTraining(Task):
    """Goes on training a teacher, whose network f(x, t, c, w) learns three things at once:

        denoising       f(x, t, c, 1) is the noise (or v)
        unconditional   f(x, t, -, 1) is the mean of f(x, t, c, 1) over the captions that x may have
        guided          f(x, t, c, w) is f(x, t, -, 1) + w (f(x, t, c, 1) - f(x, t, -, 1))

    The gradient of the last reaches all of its terms: with f(x, t, c, 1) held, training diverges. A small teacher that
    is trained on the first two alone differs with and without caption in ways that nothing asks for, and that stage 1
    would have to copy; so it learns only such differences as it can also make in one evaluation. What it exports is f
    at w = 1, a teacher like any other.

    Args:
        family: where the teacher, the autoencoder and the text side come from; the last two stay as they are.
        guidance_scales: the w that stage 1 will learn; 1 needs no training here.
        guided_weight: of the third loss. The larger, the nearer stage 1 can come, and the less guidance does.
        balance: as in `GuidanceDistillation`.
    """

    def __init__(
        self,
        family: Family,
        guidance_scales: Sequence[float],
        *,
        guided_weight: float = 4.0,
        balance: float = 1.0,
        optimizer: OptimizerSettings = OptimizerSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        self.guidance_scales = check_guidance_scales(guidance_scales)
        if set(self.guidance_scales) == {1}:
            raise ValueError(
                f"guidance_scales {list(guidance_scales)} hold no guidance to make ready for: add the w of stage 1"
            )
        self.guided_weight = check_not_negative("guided_weight", guided_weight)
        self.balance = check_not_negative("balance", balance)
        self.family = family
        self.autoencoder = family.load_autoencoder()
        self.conditioner = family.load_conditioner()
        self.model = family.load_model(guided=False).with_guidance_embedding()
        self.process, self.network = self.model.process, self.model.network.float().requires_grad_(True)

    def diffusion_models(self) -> list[DiffusionModel]:
        """The teacher."""
        return [self.model]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.losses(batch, self.draws())
        total = losses["denoising"] + losses["unconditional"] + self.guided_weight * losses["guided"]
        self.log_losses(total, losses)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        losses = self.losses(batch, self.validation_draws(batch_idx))
        self.log_dict({f"val/{name}": value for name, value in losses.items()}, sync_dist=True)

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The three, each the mean over the batch, at uniform timesteps and one w for each sample."""
        latents, captions, framing = self.encoded(batch, draws)
        t = draws.integers(len(latents), self.process.num_train_timesteps)
        noise = draws.normal(*latents.shape)
        w = draws.choice(len(latents), self.guidance_scales)

        rows = Conditioning.cat([captions, self.conditioner.unconditional(len(latents), framing), captions])
        x = self.process.add_noise(latents, noise, t).repeat(3, 1, 1, 1)
        unguided = torch.ones_like(w)
        output = self.model.predict(x, t.repeat(3), rows, torch.cat([unguided, unguided, w]))
        conditional, unconditional, guided = output.chunk(3)
        target = classifier_free_guidance(unconditional, conditional, w)
        return {
            "denoising": squared_error(conditional, self.process.target(latents, noise, t)).mean(),
            "unconditional": squared_error(unconditional, conditional.detach()).mean(),
            "guided": (squared_error(guided, target) * guidance_balance(w, self.balance)).mean(),
        }

    def recipe(self) -> dict[str, Any]:
        """The w learned, and how all is weighed."""
        return {
            "guidance_scales": list(self.guidance_scales),
            "guided_weight": self.guided_weight,
            "balance": self.balance,
        }

    def export(self, folder: Path) -> None:
        """Write the teacher's UNet, in diffusers' layout, in the place of the one before."""
        with replaced_folder(folder / "unet") as temporary:
            UNet().fold_guidance_embedding(self.network, 1.0).save_pretrained(temporary)
