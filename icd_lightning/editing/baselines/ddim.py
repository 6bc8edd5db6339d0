"""DDIM inversion (arXiv:2010.02502): the teacher itself, step by small step, both ways."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icd_lightning.diffusion import (
    Denoiser,
    GuidanceSchedule,
    NoiseSchedule,
    OnStep,
    ddim_generate,
    ddim_invert,
    ddim_timesteps,
)
from icd_lightning.editing.method import UNGUIDED, EditingMethod
from icd_lightning.models.backbone import cfg_denoiser
from icd_lightning.models.family import Family


class DDIMInversion(EditingMethod):
    """num_inference_steps evaluations to noise and as many back; guided steps by classifier-free guidance count two."""

    def __init__(self, family: Family, *, num_inference_steps: int = 50) -> None:
        self.unet = family.load_unet(guided=False)
        self.autoencoder, self.conditioner = family.load_autoencoder(), family.load_conditioner()
        self._schedule = family.load_schedule()
        self.timesteps = ddim_timesteps(num_inference_steps, self._schedule.num_train_timesteps)

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the teacher."""
        return self._schedule

    def denoiser(self, prompts: Sequence[str], guidance: GuidanceSchedule) -> Denoiser:
        """The teacher, guided by two evaluations where it is guided."""
        unconditional = self.conditioner.unconditional(len(prompts))
        return cfg_denoiser(self.unet, self._schedule, self.conditioner(prompts), unconditional, guidance)

    def to_noise(
        self, latents: Tensor, prompts: Sequence[str], *, seed: int = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Climb the solver's grid, unguided; nothing is drawn, so `seed` has no effect."""
        return ddim_invert(self.denoiser(prompts, UNGUIDED), latents, self.timesteps, self._schedule, on_step=on_step)

    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        """Descend it."""
        return ddim_generate(denoise, noise, self.timesteps, self._schedule, on_step=on_step)
