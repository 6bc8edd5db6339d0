"""FireFlow (arXiv:2412.07517): RF-Solver-Edit at the cost of Euler's steps, by velocities that are used twice.

The midpoint of a step is reached by the velocity that the step before found at its own midpoint.
"""

from __future__ import annotations

from dataclasses import replace

from icd_lightning.editing.baselines.parts import Parts
from icd_lightning.editing.baselines.rf_solver_edit import VALUES, RFSolverEdit
from icd_lightning.editing.limits import Injection

CONTROL = replace(VALUES, inject=0.23, blocks_from=0.334)
"""The first of 8 steps, which has two of the 9 evaluations; of FLUX.1's 57 blocks all 38 single ones."""


class FireFlow(RFSolverEdit):
    """num_inference_steps + 1 evaluations to noise, twice as many back: the source's, from which values are shared.

    Set as in the authors' scripts.
    """

    reuses = True

    def __init__(
        self,
        parts: Parts,
        *,
        num_inference_steps: int = 8,
        guidance_scale: float = 2.0,
        control: Injection | None = CONTROL,
    ) -> None:
        super().__init__(parts, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, control=control)
