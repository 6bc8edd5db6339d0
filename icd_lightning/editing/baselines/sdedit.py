"""SDEdit (arXiv:2108.01073): noise the picture part of the way, and decode with the target prompt. No inversion."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icd_lightning.diffusion import OnStep, Process
from icd_lightning.editing.baselines.base import DDIMBaseline, Inversion
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.method import Seed, seeded_noise


class SDEdit(DDIMBaseline):
    """Two evaluations for each step of the part, `strength`, that is noised: 0 returns the picture, 1 ignores it.

    Raises ValueError for a strength outside [0, 1].
    """

    needs, reads_source = Process, False

    def __init__(
        self, parts: Parts, *, num_inference_steps: int = 50, strength: float = 0.5, guidance_scale: float = 7.5
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=None)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength {strength} must lie between 0 (keep the picture) and 1 (ignore it)")
        self.steps = self.steps[num_inference_steps - round(strength * num_inference_steps) :]
        self.ignores_picture = len(self.steps) == num_inference_steps

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Noise x0 to where the steps begin; prompts have no effect."""
        if not self.steps:
            return Inversion(prompts, x0, x0)
        noise = seeded_noise(x0.shape, seed, x0.device)
        # even at the last timestep x_t holds a trace of x0, and a full strength must not
        noised = noise if self.ignores_picture else self.process.add_noise(x0, noise, self.steps[0][0])
        return Inversion(prompts, x0, noised)
