"""FlowEdit (arXiv:2412.08629): no inversion, but a path from picture to edit by differences of velocities.

The source is noised afresh at every step, x_s = (1 - sigma) x0 + sigma noise; the target is as far from it as the edit
z has come, x_t = z + x_s - x0, and z goes on by the difference of what the network says of the two:

    z' = z + (sigma' - sigma) (v(x_t, target) - v(x_s, source)), on average over num_noises
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
    """Two evaluations for each noise of each step taken, num_inference_steps - skip; where w takes a second one, four.

    Set as the authors set FLUX.1-dev; for SD3 they take 50 steps, skip 17, w 3.5 of the source and 13.5. `num_noises`
    is their n_avg. Their last steps without the source, off there, are left out.

    Raises ValueError for a skip that leaves no steps, for no noise, and for several where attention is borrowed.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 28,
        skip: int = 4,
        source_guidance_scale: float = 1.5,
        guidance_scale: float = 5.5,
        num_noises: int = 1,
        control: Injection | None = None,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
        if not 0 <= skip < num_inference_steps:
            raise ValueError(f"skip {skip} must be 0 or more and less than num_inference_steps {num_inference_steps}")
        if num_noises < 1:
            raise ValueError(f"num_noises {num_noises} must be 1 or more: each step averages over so many")
        self.steps, self.skipped, self.num_noises = self.steps[skip:], skip, num_noises
        self.source_guidance = StepGuidance(source_guidance_scale)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Noise x0 to where the steps begin; per_step holds the noises (num_noises B, C, h, w) for the steps after."""
        batch, *size = x0.shape
        drawn = seeded_noise((batch, len(self.steps), self.num_noises, *size), seed, x0.device)
        first, *rest = drawn.movedim(0, 2).flatten(1, 2)
        return Inversion(prompts, x0, self.noised(x0, first, self.steps[0][0]), rest)

    def noised(self, x0: Tensor, noises: Tensor, t: int) -> Tensor:
        """x0 (B, C, h, w) with each of the noises (num_noises B, C, h, w)."""
        return self.process.add_noise(x0.repeat(self.num_noises, 1, 1, 1), noises, t)

    def followed(self, index: int, guidance: GuidanceSchedule, control: Borrowed) -> Followed:
        if self.num_noises > 1 and control is not None:
            raise ValueError(f"num_noises {self.num_noises} borrow no attention: take 1, or leave out the control")
        return [("source", self.source_guidance)] * self.num_noises + [("target", guidance)] * self.num_noises

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        (t, s), x0, n = self.steps[index], inversion.x0, self.num_noises
        source, target = x.chunk(2)
        source_velocity, velocity = self.process.velocity(split).chunk(2)
        average = (velocity - source_velocity).unflatten(0, (n, -1)).mean(0).repeat(n, 1, 1, 1)
        apart = self.process.euler_step(target - source, average, t, s)
        source = self.noised(x0, inversion.per_step[index], s) if s else x0.repeat(n, 1, 1, 1)
        return torch.cat([source, source + apart])
