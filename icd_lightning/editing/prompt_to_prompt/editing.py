"""Prompt-to-Prompt as a way to decode, for any editing method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Step
from icd_lightning.editing.limits import PromptToPrompt
from icd_lightning.editing.method import UNGUIDED, EditingMethod
from icd_lightning.editing.prompt_to_prompt.control import PromptToPromptControl

DEFAULTS = PromptToPrompt()


@dataclass(frozen=True)
class PairedGuidance:
    """w (2 P,) of t (2 P,) for a batch [sources, targets]."""

    source: GuidanceSchedule
    target: GuidanceSchedule

    def __call__(self, t: Tensor) -> Tensor:
        source, target = t.chunk(2)
        return torch.cat([self.source(source), self.target(target)])


@dataclass(frozen=True, eq=False)
class PromptToPromptEditing:
    """Decode the noise of pictures with new prompts by `method`, whose network and number of steps these are."""

    method: EditingMethod
    network: nn.Module
    num_steps: int
    settings: PromptToPrompt | Sequence[PromptToPrompt] = DEFAULTS

    @torch.no_grad()
    def decode(
        self,
        noise: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Inverted noise (B, C, h, w) to latents (2 B, C, h, w), the sources' and then the targets'."""
        prompts = [*source_prompts, *target_prompts]
        tokenizer = self.method.conditioner.tokenizer
        control = PromptToPromptControl(
            self.settings, source_prompts, target_prompts, noise, tokenizer=tokenizer, num_steps=self.num_steps
        )

        def end(step: Step) -> None:
            control.on_step(step)
            if on_step is not None:
                on_step(step._replace(nfe=2 * step.nfe))  # of the source's branch and the target's

        denoise = self.method.framed_for(noise).denoiser(prompts, PairedGuidance(UNGUIDED, guidance))
        with control.attached(self.network):
            return self.method.from_noise(denoise, noise.repeat(2, 1, 1, 1), on_step=end)

    def __call__(
        self,
        noise: Tensor,
        source_prompts: Sequence[str],
        target_prompts: Sequence[str],
        *,
        guidance: GuidanceSchedule,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Inverted noise (B, C, h, w) to edited pictures (B, 3, H, W)."""
        latents = self.decode(noise, source_prompts, target_prompts, guidance=guidance, on_step=on_step)
        return self.method.autoencoder.decode(latents[len(noise) :])
