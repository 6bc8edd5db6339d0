"""DDIM inversion (arXiv:2010.02502): the teacher itself, step by small step, both ways.

To noise it is the paper's fDDIM-50, unguided; back it is DDIM-50 under any guidance, constant or dynamic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from icd_lightning.diffusion import (
    Denoiser,
    GuidanceSchedule,
    OnStep,
    StepGuidance,
    ddim_generate,
    ddim_invert,
    ddim_timesteps,
)
from icd_lightning.editing.baselines.base import DDIMBaseline
from icd_lightning.editing.method import UNGUIDED, EditingMethod, Seed
from icd_lightning.models.family import Family


class DDIMInversion(EditingMethod):
    """num_inference_steps evaluations to noise and as many back; guided steps by classifier-free guidance count two."""

    def __init__(
        self, family: Family, *, num_inference_steps: int = 50, guidance_scale: float = 8.0, tau: float = 1.0
    ) -> None:
        self.model = family.load_model(guided=False)
        self.network, self.process = self.model.network, self.model.process
        self.autoencoder, self.conditioner = family.load_autoencoder(), family.load_conditioner()
        self.timesteps = ddim_timesteps(num_inference_steps, self.process.num_train_timesteps)
        self.guidance = StepGuidance(guidance_scale, tau)

    def edit(self, *told: Any, guidance: GuidanceSchedule | None = None, **options: Any) -> Tensor:
        """As `EditingMethod.edit`, by default under the method's own guidance."""
        return super().edit(*told, guidance=guidance or self.guidance, **options)

    def denoiser(self, prompts: Sequence[str], guidance: GuidanceSchedule) -> Denoiser:
        unconditional = self.conditioner.unconditional(len(prompts))
        return self.model.denoiser(self.conditioner(prompts), guidance, unconditional)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Tensor:
        """Climb the solver's grid, unguided; nothing is drawn, so `seed` has no effect."""
        return ddim_invert(self.denoiser(prompts, UNGUIDED), x0, self.timesteps, self.process, on_step=on_step)

    def from_noise(self, denoise: Denoiser, noise: Tensor, *, on_step: OnStep | None = None) -> Tensor:
        return ddim_generate(denoise, noise, self.timesteps, self.process, on_step=on_step)


class DDIMPromptToPrompt(DDIMBaseline):
    """DDIM inversion with Prompt-to-Prompt, the field's first baseline, as in PIE-Bench (arXiv:2310.01506).

    num_inference_steps evaluations to noise; back, four a step: the source's branch is guided too, and so leaves the
    path by which inversion came.
    """

    guides_source = True
