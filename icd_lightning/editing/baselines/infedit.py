"""InfEdit (arXiv:2312.04965): virtual inversion, a few steps of a latent consistency model beside the known source.

The source's branch is noised afresh at every step, so nothing is inverted: the noise that takes it back to the picture,
e_c, is known. The target's branch takes the same noise and moves by how the two predictions differ:

    eps = (e_t - e_s) + e_c,    x_0' = x_0 + ((x_t - x_s) - sigma (e_t - e_s)) / alpha

A third branch (mutual) is told the source's prompt, and differs from the source's only by the paper's unified attention
control, through which it carries layout to the target. That control is not built here: with Prompt-to-Prompt or with
none, the third branch would repeat the source's, so it is not run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.diffusion import OnStep, falling, lcm_timesteps
from icd_lightning.editing.baselines.base import Baseline, Inversion
from icd_lightning.editing.baselines.parts import LCM_SOLVER_TIMESTEPS, Parts
from icd_lightning.editing.method import Seed, seeded_noise
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt

CONTROL = PromptToPrompt(cross_replace=0.7, self_replace=0.7, amplify=1.0, blend_threshold=0.55)


class InfEdit(Baseline):
    """Evaluations for each step: one for the source, and one or two for the target, as the network takes guidance.

    tiny has no LCM; there, as in every family that has one, the guidance-distilled UNet stands in. It predicts the mean
    of the data, blurred where an LCM is sharp, so that such results say little about InfEdit on an LCM.

    The paper's mutual branch and its threshold, 0.6, are not built: all that is borrowed is the source's attention, by
    Prompt-to-Prompt.

    An edit to the same prompt under w = 1 returns the source; guided it does not, since the source's branch is not.
    """

    few_step, needs_source = True, True

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 12,
        guidance_scale: float = 2.3,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        grid = lcm_timesteps(num_inference_steps, LCM_SOLVER_TIMESTEPS)
        self.steps, self.inversion_nfe = falling(grid), 0

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Draw what the branches share: where they begin, and per_step the noise (B, C, h, w) after each step."""
        batch, *size = x0.shape
        first, *rest = seeded_noise((batch, len(self.steps), *size), seed, x0.device).unbind(1)
        return Inversion(prompts, x0, first, rest)

    def move(self, x: Tensor, eps: Tensor, index: int, inversion: Inversion) -> Tensor:
        """Correct the target by the source's known error, and noise both alike for the next step."""
        t, s = self.steps[index]
        (x_s, x_t), (e_s, e_t), x0 = x.chunk(2), eps.chunk(2), inversion.x0
        std = self.schedule.sigma(s)
        noise = inversion.per_step[index] if s else torch.zeros_like(x0)
        eps = (e_t - e_s) + self.schedule.eps_from_x0(x_s, x0, t)
        target = self.schedule.ddim_step(x_t, eps, t, s, noise_std=std) + std * noise
        return torch.cat([self.schedule.alpha(s) * x0 + std * noise, target])
