"""FlowEdit (arXiv:2412.08629): no inversion, but a path from picture to edit by differences of velocities.

The source is noised afresh at every step, x_s = (1 - sigma) x0 + sigma noise; the target is as far from it as the edit
z has come, x_t = z + x_s - x0, and z goes on by the difference of what the network says of the two:

    z' = z + (sigma' - sigma) (v(x_t, target) - v(x_s, source))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Split, StepGuidance
from icd_lightning.editing.baselines.base import Borrowed, Followed, Inversion
from icd_lightning.editing.baselines.flow import FlowBaseline
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.method import Seed, seeded_noise


class FlowEdit(FlowBaseline):
    """Two evaluations for each step that is taken, num_inference_steps - skip; where w takes a second one, four.

    Set as the authors set FLUX.1-dev; for SD3 they take 50 steps, skip 17, w 3.5 of the source and 13.5. Their average
    over several noises and their last steps without the source, both off there, are left out.

    Raises ValueError for a skip that leaves no steps.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 28,
        skip: int = 4,
        source_guidance_scale: float = 1.5,
        guidance_scale: float = 5.5,
        control: Injection | None = None,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
        if not 0 <= skip < num_inference_steps:
            raise ValueError(f"skip {skip} must be 0 or more and less than num_inference_steps {num_inference_steps}")
        self.steps, self.skipped = self.steps[skip:], skip
        self.source_guidance = StepGuidance(source_guidance_scale)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Noise x0 to where the steps begin; per_step holds the noise (B, C, h, w) for the steps after."""
        batch, *size = x0.shape
        first, *rest = seeded_noise((batch, len(self.steps), *size), seed, x0.device).unbind(1)
        return Inversion(prompts, x0, self.process.add_noise(x0, first, self.steps[0][0]), rest)

    def followed(self, index: int, guidance: GuidanceSchedule, control: Borrowed) -> Followed:
        """Both, the source under its own guidance."""
        return [("source", self.source_guidance), ("target", guidance)]

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        """The source noised for the next step, and the target beside it."""
        (t, s), x0 = self.steps[index], inversion.x0
        source, target = x.chunk(2)
        source_velocity, velocity = self.process.velocity(split).chunk(2)
        apart = self.process.euler_step(target - source, velocity - source_velocity, t, s)
        source = self.process.add_noise(x0, inversion.per_step[index], s) if s else x0
        return torch.cat([source, source + apart])
