"""The only home of w: w = 1 is unguided everywhere, and only here is 1 ever subtracted from it.

Guidance enters a network in one of two ways: by classifier-free guidance, which evaluates it twice, or by an embedding
of w that a guidance-distilled network was taught to obey. A `GuidanceSchedule` lets w depend on the timestep in either.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor


def classifier_free_guidance(eps_uncond: Tensor, eps_cond: Tensor, guidance_scale: Tensor | float) -> Tensor:
    """Guided noise (B, C, H, W) from two predictions (B, C, H, W) at guidance_scale, a number or (B,).

    0 is unconditional, 1 is unguided: eps_cond.
    """
    if isinstance(guidance_scale, Tensor):
        guidance_scale = guidance_scale.view(-1, 1, 1, 1)
    return eps_uncond + guidance_scale * (eps_cond - eps_uncond)


def guidance_embedding(guidance_scale: Tensor, dim: int = 512) -> Tensor:
    """Embed guidance_scale (B,) as (B, dim) float32, the `timestep_cond` of a guidance-distilled UNet.

    Sines, then cosines, of 1000 (w - 1) at dim / 2 frequencies from 1 down to 1/10000. ValueError for an odd dim.
    """
    if dim % 2 or dim < 4:
        raise ValueError(
            f"guidance embedding of width {dim} cannot hold sines and cosines; choose an even dim of 4 or more"
        )
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(exponents * (-math.log(10000.0) / (half - 1)))
    angles = (guidance_scale.float() - 1)[:, None] * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def guidance_balance(guidance_scale: Tensor, balance: float) -> Tensor:
    """Weights 1 / (1 + balance (w - 1)^2) of samples' losses at guidance_scale (B,).

    What guidance adds to a prediction grows as w - 1, so that with balance 0 the largest scales drown the small ones.
    """
    return 1 / (1 + balance * (guidance_scale - 1) ** 2)


@dataclass(frozen=True)
class GuidanceSchedule(ABC):
    """w(t) (B,) float32 of t (B,): guidance_scale where guidance is on, 1 where it is off, between where it fades.

    Raises ValueError for a scale that is negative or not finite, and for `limits` not ordered within [0, 1].
    """

    limits: ClassVar[tuple[str, ...]] = ()
    """The fields of a subclass that are fractions of num_train_timesteps, in ascending order."""

    guidance_scale: float
    _: KW_ONLY
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"guidance_scale {self.guidance_scale} must be 0 (unconditional; 1 is unguided) or more")
        limits = {name: getattr(self, name) for name in self.limits}
        if not all(lower <= upper for lower, upper in pairwise((0, *limits.values(), 1))):
            named = ", ".join(f"{name}={value}" for name, value in limits.items())
            raise ValueError(f"{named}: choose fractions of the time axis between 0 and 1, in ascending order")

    def __call__(self, t: Tensor) -> Tensor:
        """The guidance scale (B,) float32 at timesteps t (B,)."""
        strength = self.strength(t.float())
        return (1 - strength) + strength * self.guidance_scale

    @property
    def highest(self) -> float:
        """The fraction of T above which nothing is guided: tau, tau2 or hi; 1 of a schedule without limits."""
        return max((getattr(self, name) for name in self.limits), default=1.0)

    def at(self, t: int) -> float:
        """The guidance scale at one timestep."""
        return float(self(torch.tensor([t])))

    @abstractmethod
    def strength(self, t: Tensor) -> Tensor:
        """How much of the guidance applies (B,), 0 to 1, at t (B,) float32."""


@dataclass(frozen=True)
class StepGuidance(GuidanceSchedule):
    """Dynamic guidance (arXiv:2406.14539): guided for t (B,) <= tau T, unguided above; tau = 1 is constant."""

    limits = ("tau",)

    tau: float = 1.0

    def strength(self, t: Tensor) -> Tensor:
        return (t <= self.tau * self.num_train_timesteps).float()


@dataclass(frozen=True)
class CADSGuidance(GuidanceSchedule):
    """Guided below tau1, unguided above tau2, fading linearly between (arXiv:2310.17347); tau1 = tau2 is the step."""

    limits = ("tau1", "tau2")

    tau1: float
    tau2: float

    def strength(self, t: Tensor) -> Tensor:
        full, none = self.tau1 * self.num_train_timesteps, self.tau2 * self.num_train_timesteps
        fading = ((none - t) / max(none - full, 1e-6)).clamp(0, 1)
        return torch.where(t <= full, torch.ones_like(t), fading)


@dataclass(frozen=True)
class IntervalGuidance(GuidanceSchedule):
    """Guided for lo T <= t (B,) <= hi T only (Kynkaanniemi et al., arXiv:2404.07724)."""

    limits = ("lo", "hi")

    lo: float
    hi: float

    def strength(self, t: Tensor) -> Tensor:
        total = self.num_train_timesteps
        return ((t >= self.lo * total) & (t <= self.hi * total)).float()
