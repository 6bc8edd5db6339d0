"""Sizes of batches for pictures that are not square, as SDXL is trained (arXiv:2307.01952, appendix I)."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache
def bucket_sizes(resolution: int) -> tuple[tuple[int, int], ...]:
    """All (height, width) of nearly resolution^2 pixels and not more, from 1:4 to 4:1, in steps of up to 64 pixels."""
    step = bucket_step(resolution)
    sides = range(resolution // 2, 2 * resolution + 1, step)
    sizes = {(side, resolution * resolution // side // step * step) for side in sides}
    return tuple(sorted(sizes | {(width, height) for height, width in sizes}))


def nearest_bucket(height: int, width: int, resolution: int) -> tuple[int, int]:
    """The bucket (height, width) whose form is nearest to a picture's."""

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(height / width) - math.log(size[0] / size[1]))

    return min(bucket_sizes(resolution), key=distance)


def bucket_step(resolution: int) -> int:
    """The largest power of two up to an eighth of the resolution, from 8 to 64: latents have whole sides."""
    return 1 << (min(512, max(64, resolution)).bit_length() - 4)
