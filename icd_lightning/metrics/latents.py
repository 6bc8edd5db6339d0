"""What is asked of latents that pictures were inverted to."""

from __future__ import annotations

import math

from torch import Tensor

from icd_lightning.metrics.base import PerImage


class LatentNLL(PerImage):
    """Mean over images of -log N(noise; 0, I) per dimension (Table 1, arXiv:2406.14539).

    True noise has (1 + log 2 pi) / 2 = 1.419; less is noise too quiet, more noise too loud.
    """

    needs = ("noise",)
    digits = 3

    def values(self, noise: Tensor) -> Tensor:
        return 0.5 * (noise.float().square().flatten(1).mean(1) + math.log(2 * math.pi))
