"""InfEdit (arXiv:2312.04965): virtual inversion, a few steps of a latent consistency model beside the known source.

The source's branch is noised afresh at every step, so nothing is inverted: the noise that takes it back to the picture,
e_c, is known. Every other branch b takes the same noise and moves by how its prediction differs from the source's:

    eps = (e_b - e_s) + e_c,    x_0' = x_0 + ((x_b - x_s) - sigma (e_b - e_s)) / alpha

With attention control there are two: the target's, and the mutual one of `prompt_to_prompt.unified`, which is told the
source's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.diffusion import VP, GuidanceSchedule, OnStep, Split, falling, lcm_timesteps
from icd_lightning.editing.baselines.base import Baseline, Borrowed, Followed, Inversion
from icd_lightning.editing.baselines.parts import LCM_SOLVER_TIMESTEPS, Parts
from icd_lightning.editing.method import UNGUIDED, Seed, seeded_noise
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.editing.prompt_to_prompt.unified import UnifiedAttentionControl, mutual_begins

CONTROL = PromptToPrompt(cross_replace=0.7, self_replace=0.7, amplify=1.0, blend_threshold=0.55)


class InfEdit(Baseline):
    """Evaluations for each step: two for each branch of an LCM, which as in the authors' code is told no w and guided
    by a second evaluation. There is a branch for the source, one for the target, and the mutual one once it differs
    from the source (after 8 of 12 steps, as it is set).

    tiny has no LCM; there, as in every family that has one, the guidance-distilled network stands in, one evaluation a
    branch. It predicts the mean of the data, blurred where an LCM is sharp, so that such results say little about
    InfEdit on an LCM.

    Set as in the authors' run of PIE-Bench, where no words are kept from the source, so that their second threshold,
    0.6, has nothing to act on. Words are paired as in Prompt-to-Prompt; the authors pair new ones by their embeddings.

    An edit to the same prompt under w = 1 returns the source; guided it does not, since the source's branch is not.
    """

    needs, few_step, paired = VP, True, True

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 12,
        guidance_scale: float = 2.3,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, guidance_scale, control)
        self.steps = falling(lcm_timesteps(num_inference_steps, LCM_SOLVER_TIMESTEPS))

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Draw what the branches share: where they begin, and per_step the noise (B, C, h, w) after each step."""
        batch, *size = x0.shape
        first, *rest = seeded_noise((batch, len(self.steps), *size), seed, x0.device).unbind(1)
        return Inversion(prompts, x0, first, rest)

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        """Correct all but the source by the source's known error, and noise all alike for the next step."""
        (t, s), x0, eps = self.steps[index], inversion.x0, split.eps
        count = len(x0)
        std = self.process.sigma(s)
        noise = std * inversion.per_step[index] if s else torch.zeros_like(x0)
        known = self.process.eps_from_x0(x[:count], x0, t) - eps[:count]
        others = [
            self.process.ddim_step(x_b, e_b + known, t, s, noise_std=std) + noise
            for x_b, e_b in zip(x[count:].split(count), eps[count:].split(count), strict=True)
        ]
        return torch.cat([self.process.alpha(s) * x0 + noise, *others])

    def followed(self, index: int, guidance: GuidanceSchedule, control: Borrowed) -> Followed:
        mutual = control is not None and index >= mutual_begins(control, len(self.steps))
        return [("source", UNGUIDED)] * (1 + mutual) + [("target", guidance)]

    def attention_control(
        self, control: PromptToPrompt | Sequence[PromptToPrompt], inversion: Inversion, prompts: Sequence[str]
    ) -> UnifiedAttentionControl:
        alphas = [float(self.process.alpha(t)) for t, _ in self.steps]
        edits = (inversion.prompts, prompts, inversion.noise)
        return UnifiedAttentionControl(control, *edits, tokenizer=self.conditioner.tokenizer, alphas=alphas)
