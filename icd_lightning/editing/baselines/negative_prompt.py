"""Negative-prompt inversion (arXiv:2305.16807): DDIM inversion, then guidance away from the source prompt.

With the source prompt on both sides guidance cancels at any scale, so that decoding retraces the unguided inversion:
null-text inversion's effect without its optimisation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icd_lightning.diffusion import OnStep, ddim_invert, ddim_timesteps, falling
from icd_lightning.editing.baselines.base import Baseline, Inversion
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.method import Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.models.conditioning import Conditioning

CONTROL = PromptToPrompt(cross_replace=0.2, self_replace=0.5, amplify=2.0, blend_from=0.2)


class NegativePromptInversion(Baseline):
    """num_inference_steps evaluations to noise; twice as many back, and one a step for the source's branch."""

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 8.0,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        if parts.network.takes_guidance:
            raise ValueError(
                "negative-prompt inversion puts a prompt where classifier-free guidance has the empty one: it needs a "
                "network without guidance embedding, no LCM or guidance-distilled one"
            )
        self.timesteps = ddim_timesteps(num_inference_steps, self.process.num_train_timesteps)
        self.steps, self.inversion_nfe = falling(self.timesteps), num_inference_steps

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the solver's grid, unguided; nothing is drawn, so `seed` has no effect."""
        denoise = self.denoiser(self.conditioner(prompts))
        return Inversion(prompts, x0, ddim_invert(denoise, x0, self.timesteps, self.process, on_step=on_step))

    def negative(self, index: int, inversion: Inversion, source: Conditioning, empty: Conditioning) -> Conditioning:
        """The source prompt, always."""
        return source

    def move(self, x: Tensor, eps: Tensor, index: int, inversion: Inversion) -> Tensor:
        """One DDIM step."""
        return self.process.ddim_step(x, eps, *self.steps[index], set_alpha_to_one=False)
