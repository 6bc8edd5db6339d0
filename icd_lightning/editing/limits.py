"""What settings of an edit may be. The standard library only: commands refuse a bad value before torch is loaded."""

from __future__ import annotations

import math

SHORT_NAMES = {"cross": "cross_replace", "self": "self_replace"}
"""What commands also call these settings of `PromptToPrompt`."""


def check_guidance_scale(value: float, name: str = "guidance_scale") -> float:
    """w: 1 is unguided, and less was never trained."""
    if not 1 <= value < math.inf:
        raise ValueError(f"{name} {value} must be 1 (unguided) or more")
    return value


def check_fraction(value: float, name: str) -> float:
    """A share of the time axis, or of the steps."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is no fraction: choose between 0 and 1")
    return value


def check_factor(value: float, name: str = "amplify") -> float:
    """A factor of attention."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} {value} must be 0 or more: 1 leaves attention alone, 0 takes it away")
    return value


def check_seed(value: int) -> int:
    """What a generator of torch's can be seeded with."""
    if not 0 <= value < 2**63:
        raise ValueError(f"seed {value} must be 0 or more, and less than 2^63")
    return value
