"""Negative-prompt inversion (arXiv:2305.16807): DDIM inversion, then guidance away from the source prompt.

With the source prompt on both sides guidance cancels at any scale, so that decoding retraces the unguided inversion:
null-text inversion's effect without its optimisation.
"""

from __future__ import annotations

from icd_lightning.editing.baselines.base import DDIMBaseline, Inversion
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.prompt_to_prompt import PromptToPrompt
from icd_lightning.models.conditioning import Conditioning

CONTROL = PromptToPrompt(cross_replace=0.2, self_replace=0.5, amplify=3.0)


class NegativePromptInversion(DDIMBaseline):
    """num_inference_steps evaluations to noise; twice as many back, and one a step for the source's branch.

    Set as in iCD's script; `npi_pie` is set as in PIE-Bench's.
    """

    leads_from_prompts = True

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 8.0,
        control: PromptToPrompt | None = CONTROL,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)

    def negative(self, index: int, inversion: Inversion, source: Conditioning, empty: Conditioning) -> Conditioning:
        return source
