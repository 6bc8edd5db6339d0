"""Null-text inversion (arXiv:2211.09794): an empty prompt's embedding for each step, fitted so that guidance retraces.

Guided decoding leaves the path by which DDIM inversion came. For each step down the null embedding is optimised until
the guided step meets that path again; edits reuse the embeddings with another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icd_lightning.diffusion import OnStep, Step, classifier_free_guidance
from icd_lightning.editing.baselines.base import DDIMBaseline, Inversion
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.method import Seed
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.models.conditioning import Conditioning

CONTROL = PromptToPrompt(cross_replace=0.4, self_replace=0.8, amplify=3.0)


@dataclass(frozen=True)
class NullTextOptimization:
    """Adam on the embedding of step i: at most `inner_steps` at rate lr (1 - i / 100), until the error is small.

    Small is tolerance + i * tolerance_growth, as a mean square over the latents.
    """

    inner_steps: int = 10
    lr: float = 1e-2
    tolerance: float = 1e-5
    tolerance_growth: float = 2e-5

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps {self.inner_steps} must be 1 or more; negative-prompt inversion needs none")


OPTIMIZATION = NullTextOptimization()


class NullTextInversion(DDIMBaseline):
    """num_inference_steps evaluations to noise, then up to inner_steps + 2 for each step; back, two for each branch.

    Inner evaluations also run backward, which is not counted. Set as in iCD's script; `nti_pie` is set as in
    PIE-Bench's.
    """

    fits_guidance, guides_source, leads_from_prompts = True, True, True  # the embeddings were fitted to guidance

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 8.0,
        optimization: NullTextOptimization = OPTIMIZATION,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
        self.optimization = optimization

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the solver's grid, then fit; per_step holds null embeddings (B, L, D). `seed` has no effect."""
        source, null = self.conditioner(prompts), self.conditioner.unconditional(len(prompts))
        path, null_embeds = self.path(x0, source, on_step=on_step), []
        x = path[-1]
        for index, (t, s) in enumerate(self.steps):
            x, null, rounds = self.fit_step(x, path[-2 - index], index, source, null)
            null_embeds.append(null.tensors["prompt_embeds"])
            if on_step is not None:
                on_step(Step(t, s, x, rounds + 2))
        return Inversion(prompts, x0, path[-1], null_embeds)

    @torch.no_grad()
    def fit_step(
        self, x: Tensor, wanted: Tensor, index: int, source: Conditioning, null: Conditioning
    ) -> tuple[Tensor, Conditioning, int]:
        """Fit one step's null embeddings, from the last one's, so that x (B, C, h, w) comes to `wanted` (B, C, h, w).

        Returns x after the step, the embeddings, and how many rounds it took.
        """
        settings, t = self.optimization, self.steps[index][0]
        w = self.guidance.at(t)
        eps_cond = self.parts.eps(x, t, source)

        def guided(null: Conditioning) -> Tensor:
            eps = classifier_free_guidance(self.parts.eps(x, t, null), eps_cond, w)
            return self.ddim_step(x, eps, index)

        embeds = null.tensors["prompt_embeds"].float().clone().requires_grad_()
        optimizer = torch.optim.Adam([embeds], lr=settings.lr * (1 - index / 100))
        running = torch.ones(len(x), dtype=torch.bool, device=x.device)
        rounds = 0
        while running.any() and rounds < settings.inner_steps:
            rounds += 1
            with torch.enable_grad():
                error = (guided(null.replace(prompt_embeds=embeds)) - wanted).square().mean((1, 2, 3))
                (embeds.grad,) = torch.autograd.grad(error.sum(), embeds)
            before = embeds.detach().clone()
            optimizer.step()
            # a sample that is done stays as it is, so that it comes out as it would alone
            embeds.data = torch.where(running[:, None, None], embeds, before)
            running &= error.detach() >= settings.tolerance + index * settings.tolerance_growth
        null = null.replace(prompt_embeds=embeds.detach())
        return guided(null), null, rounds

    def negative(self, index: int, inversion: Inversion, source: Conditioning, empty: Conditioning) -> Conditioning:
        return empty.replace(prompt_embeds=inversion.per_step[index])
