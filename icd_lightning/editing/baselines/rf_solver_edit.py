"""RF-Solver-Edit (arXiv:2411.04746): invert and decode by a solver of second order, and share values of attention.

Its step is the midpoint rule: the authors' Taylor expansion takes the velocity's derivative from the midpoint, and so
comes to x + (sigma_s - sigma_t) v(midpoint). Values go from the source's branch beside the target's, at the same
evaluation; the authors keep those of the way up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from icd_lightning.diffusion import OnStep
from icd_lightning.editing.baselines.base import Inversion
from icd_lightning.editing.baselines.flow import FlowBaseline, LookAhead
from icd_lightning.editing.baselines.parts import Move, Parts
from icd_lightning.editing.limits import Injection
from icd_lightning.editing.method import Seed

VALUES = Injection(inject=0.14, blocks_from=0.685, keys=False, text=True, blend=False)
"""Two of 15 steps; of FLUX.1's 57 blocks the last 18."""


class RFSolverEdit(FlowBaseline):
    """Two evaluations for each step up, and four back: two for the source, from which values are shared.

    Set as in the authors' scripts.
    """

    reuses: ClassVar[bool] = False

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 15,
        guidance_scale: float = 2.0,
        control: Injection | None = VALUES,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
        self.solver, self.whole_steps = LookAhead(self.process, 0.5, self.reuses), self.steps
        self.steps = self.solver.evaluations(self.whole_steps)

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the grid, unguided; nothing is drawn, so `seed` has no effect."""
        up = [(s, t) for t, s in reversed(self.whole_steps)]
        noise = self.climb(x0, prompts, self.solver.evaluations(up), self.solver.mover(up), on_step)
        return Inversion(prompts, x0, noise)

    def mover(self, inversion: Inversion) -> Move:
        return self.solver.mover(self.whole_steps)
