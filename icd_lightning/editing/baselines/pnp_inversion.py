"""PnP-Inversion, or direct inversion (arXiv:2310.01506): put the source's branch back on its path at every step.

Guided decoding leaves the path by which DDIM inversion came. The differences are kept and added to the source's branch
alone, whose attention then is the picture's own; the target's branch stays as free as guidance makes it. Without
attention control nothing passes between the two, and the edit is plain DDIM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, ddim_path, ddim_timesteps, falling
from icd_lightning.editing.baselines.base import Baseline, Inversion
from icd_lightning.editing.baselines.branches import Branch, descend
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.method import Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt

CONTROL = PromptToPrompt(cross_replace=0.4, self_replace=0.6, amplify=2.0, blend_from=0.2)


class PnPInversion(Baseline):
    """num_inference_steps evaluations to noise, two a step for the differences, and four a step for both branches."""

    needs_source, fits_guidance = True, True

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        self.timesteps = ddim_timesteps(num_inference_steps, self.process.num_train_timesteps)
        self.steps = falling(self.timesteps)

    @property
    def inversion_nfe(self) -> int:
        """One a step to noise, and what guidance takes for the differences."""
        return len(self.steps) + sum(self.parts.network.cost(self.guidance, t) for t, _ in self.steps)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the solver's grid; per_step holds what guided steps miss of it (B, C, h, w). `seed` has no effect."""
        source = self.conditioner(prompts)
        path = ddim_path(self.denoiser(source), x0, self.timesteps, self.process, on_step=on_step)
        branch = Branch(source, self.conditioner.unconditional(len(prompts)), self.guidance)
        missed: list[Tensor] = []

        def compare(x: Tensor, eps: Tensor, index: int) -> Tensor:
            missed.append(path[-2 - index] - self._ddim(x, eps, index))
            return path[-2 - index]

        descend(self.parts.network, path[-1], self.steps, lambda index: [branch], compare, on_step=on_step)
        return Inversion(prompts, x0, path[-1], missed)

    def source_guidance(self, guidance: GuidanceSchedule) -> GuidanceSchedule:
        """The guidance under which the differences were found, whatever the target's."""
        return self.guidance

    def move(self, x: Tensor, eps: Tensor, index: int, inversion: Inversion) -> Tensor:
        """One DDIM step, and the source's branch back on its path."""
        source, target = self._ddim(x, eps, index).chunk(2)
        return torch.cat([source + inversion.per_step[index], target])

    def _ddim(self, x: Tensor, eps: Tensor, index: int) -> Tensor:
        return self.process.ddim_step(x, eps, *self.steps[index], set_alpha_to_one=False)
