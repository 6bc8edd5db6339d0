"""UniEdit-Flow (arXiv:2504.13109): inversion that looks one step ahead, and an edit by where two velocities differ.

Uni-Inv takes each step up by the velocity at its end, which the velocity of the step before leads to. Uni-Edit asks
of one x under both prompts; the difference d = v_target - v_source, as a mask m of places in [0, 1], says where:

    v = m v_target + (1 - m) v_source + omega (1 + m) d
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Split
from icd_lightning.editing.baselines.base import Borrowed, Followed, Inversion
from icd_lightning.editing.baselines.flow import FlowBaseline, LookAhead
from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.limits import Injection, check_fraction
from icd_lightning.editing.method import Seed


class UniEditFlow(FlowBaseline):
    """One evaluation more than steps on the way up, two for each step back; they are `strength` of num_inference_steps.

    `omega` is how far the edit goes beyond the target's velocity; guidance, of both prompts alike, is off in the
    authors' runs. Their mask is of 2 x 2 latents, a token of FLUX.1's, and of one picture; here of single latents.
    """

    guides_source = True

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 15,
        strength: float = 0.6,
        omega: float = 5.0,
        guidance_scale: float = 1.0,
        control: Injection | None = None,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
        count = round(check_fraction(strength, "strength") * num_inference_steps)
        self.steps, self.skipped = self.steps[num_inference_steps - count :], num_inference_steps - count
        self.omega = omega

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the grid's part, unguided, under the empty prompt; neither prompts nor `seed` have an effect."""
        solver, up = LookAhead(self.process, 1.0, reuses=True), [(s, t) for t, s in reversed(self.steps)]
        return Inversion(prompts, x0, self.climb(x0, [""] * len(x0), solver.evaluations(up), solver.mover(up), on_step))

    def followed(self, index: int, guidance: GuidanceSchedule, control: Borrowed) -> Followed:
        return [("source", guidance), ("target", guidance)]

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        """One step of Euler's by the velocities put together, the same for both branches."""
        source, target = self.process.velocity(split).chunk(2)
        difference = target - source
        places = difference.abs().mean(1, keepdim=True)
        places = places - places.amin((2, 3), keepdim=True)
        mask = places / places.amax((2, 3), keepdim=True).clamp(min=1e-7)  # equal prompts differ nowhere
        velocity = source.lerp(target, mask) + self.omega * (1 + mask) * difference
        return self.process.euler_step(x, velocity.repeat(2, 1, 1, 1), *self.steps[index])
