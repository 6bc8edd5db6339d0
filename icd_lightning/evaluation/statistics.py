"""Means with their uncertainty, by resampling pictures, and what may be said of two that are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1_000  # as in the paper's confidence intervals, arXiv:2406.14539
LEVEL = 0.95


class Estimate(float):
    """A mean, and the limits between which 95 % of means of resampled pictures lie; as text, mean ± half of that."""

    low: float
    high: float

    def __new__(cls, mean: float, low: float, high: float) -> Estimate:
        self = super().__new__(cls, mean)
        self.low, self.high = float(low), float(high)
        return self

    def __format__(self, spec: str) -> str:
        half = (self.high - self.low) / 2
        return f"{float(self):{spec}}" + ("" if math.isnan(half) else f" ± {half:{spec}}")

    def scaled(self, factor: float) -> Estimate:
        """In another unit."""
        return Estimate(factor * self, factor * self.low, factor * self.high)

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        limits = {"low": self.low, "high": self.high}
        return {"mean": float(self), **{name: None if math.isnan(x) else x for name, x in limits.items()}}


def bootstrap(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of one value a picture, with percentiles of the means of `resamples` samples drawn with replacement.

    NaN stands for a picture on which the value means nothing, and is left out; one picture alone has no interval.
    Raises ValueError without any value.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if not array.size:
        raise ValueError("there is no value to average: the metric means nothing on any of these pictures")
    if array.size == 1:
        return Estimate(array[0], math.nan, math.nan)
    low, high = _limits(_resampled(array, resamples, seed).mean(1))
    return Estimate(array.mean(), low, high)


def percentiles(values: ArrayLike, shares: ArrayLike) -> list[Estimate]:
    """Percentiles of one value a picture at `shares` from 0 to 100, each with the limits that resampling gives it."""
    array = np.asarray(values, dtype=np.float64)
    resampled = np.percentile(_resampled(array, RESAMPLES, 0), shares, axis=1)
    return [Estimate(value, *_limits(row)) for value, row in zip(np.percentile(array, shares), resampled, strict=True)]


def _resampled(array: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Samples drawn with replacement, (resamples, pictures)."""
    return array[np.random.default_rng(seed).integers(array.size, size=(resamples, array.size))]


def _limits(means: np.ndarray) -> np.ndarray:
    """Between which LEVEL of them lie: order statistics, so that infinite values (PSNR of equals) give no NaN."""
    outside = 50 * (1 - LEVEL)
    return np.percentile(means, (outside, 100 - outside), method="nearest")


MIN_SEEDS = 3
"""Trainings from which their scatter is taken into account; fewer tell little of it."""


class Verdict(NamedTuple):
    """Whether `better` really is above `worse`: the difference over the same pictures, and the seeds that agree.

    The difference's interval is over resampled pictures and, with MIN_SEEDS or more, over trainings as well; with fewer
    the verdict is of these trainings only.
    """

    worse: str
    better: str
    difference: Estimate
    seeds_agreeing: int
    seeds: int

    @property
    def word(self) -> str:
        """found, reversed, or undecided where the interval of the difference holds 0."""
        if self.difference.low > 0:
            return "found"
        return "reversed" if self.difference.high < 0 else "undecided"


def compare(worse: str, better: str, values: dict[str, Sequence[ArrayLike]]) -> Verdict:
    """Judge `worse` < `better` from values[name][seed], one value for each picture, the same pictures in all."""
    lower, upper = (np.asarray(values[name], dtype=np.float64) for name in (worse, better))  # (seeds, pictures)
    if lower.shape != upper.shape:
        raise ValueError(f"{worse} and {better} differ in seeds or pictures: {lower.shape} and {upper.shape}")
    difference = upper - lower
    agreeing = int((difference.mean(1) > 0).sum())
    estimate = bootstrap(difference.mean(0)) if len(difference) < MIN_SEEDS else _over_seeds(difference)
    return Verdict(worse, better, estimate, agreeing, len(difference))


def _over_seeds(difference: np.ndarray) -> Estimate:
    """Mean of (seeds, pictures), with limits over resampled pictures and over other trainings.

    A mean over so few trainings is off by their scatter times Student's t: drawing them with replacement would make
    intervals too narrow.
    """
    seeds = len(difference)
    pictures = _resampled(difference.mean(0), RESAMPLES, 0).mean(1)
    scatter = difference.mean(1).std(ddof=1) / math.sqrt(seeds)
    others = scatter * np.random.default_rng(1).standard_t(seeds - 1, RESAMPLES)
    return Estimate(difference.mean(), *_limits(pictures + others))
