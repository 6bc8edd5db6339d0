"""PnP-Inversion, or direct inversion (arXiv:2310.01506): put the source's branch back on its path at every step.

Guided decoding leaves the path by which DDIM inversion came. The differences are kept and added to the source's branch
alone, whose attention then is the picture's own; the target's branch stays as free as guidance makes it. Without
attention control nothing passes between the two, and the edit is plain DDIM's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icd_lightning.diffusion import GuidanceSchedule, OnStep, Split
from icd_lightning.editing.baselines.base import Borrowed, DDIMBaseline, Followed, Inversion
from icd_lightning.editing.baselines.parts import Branch, descend
from icd_lightning.editing.method import Seed


class PnPInversion(DDIMBaseline):
    """num_inference_steps evaluations to noise, two a step for the differences, and four a step for both branches."""

    fits_guidance = True

    def invert_latents(
        self, x0: Tensor, prompts: Sequence[str], *, seed: Seed = 0, on_step: OnStep | None = None
    ) -> Inversion:
        """Climb the solver's grid; per_step holds what guided steps miss of it (B, C, h, w). `seed` has no effect."""
        source = self.conditioner(prompts)
        path = self.path(x0, source, on_step=on_step)
        branches = [Branch(source, self.conditioner.unconditional(len(prompts)), self.guidance)]
        missed: list[Tensor] = []

        def compare(x: Tensor, split: Split, index: int) -> Tensor:
            missed.append(path[-2 - index] - self.ddim_step(x, split.eps, index))
            return path[-2 - index]

        descend(self.parts, path[-1], self.steps, lambda index: branches, compare, on_step=on_step)
        return Inversion(prompts, x0, path[-1], missed)

    def followed(self, index: int, guidance: GuidanceSchedule, control: Borrowed) -> Followed:
        """The source under the guidance by which the differences were found, whatever the target's."""
        return [("source", self.guidance), ("target", guidance)]

    def move(self, x: Tensor, split: Split, index: int, inversion: Inversion) -> Tensor:
        source, target = self.ddim_step(x, split.eps, index).chunk(2)
        return torch.cat([source + inversion.per_step[index], target])
