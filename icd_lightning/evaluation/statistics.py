"""Means with their uncertainty, by resampling pictures."""

from __future__ import annotations

import math
from functools import cache

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

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(factor * float(self), factor * self.low, factor * self.high)

    def as_dict(self) -> dict[str, float | None]:
        limits = {"low": self.low, "high": self.high}
        return {"mean": float(self), **{name: None if math.isnan(x) else x for name, x in limits.items()}}


def bootstrap(values: ArrayLike) -> Estimate:
    """Mean of one value a picture, with percentiles of the means of RESAMPLES samples drawn with replacement.

    NaN stands for a picture on which the value means nothing, and is left out; one picture alone has no interval.
    Raises ValueError without any value.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if not array.size:
        raise ValueError("there is no value to average: the metric means nothing on any of these pictures")
    if array.size == 1:
        return Estimate(array[0], math.nan, math.nan)
    low, high = _limits(_resampled(array).mean(1))
    return Estimate(array.mean(), low, high)


def percentiles(values: ArrayLike, shares: ArrayLike) -> list[Estimate]:
    """Percentiles of one value a picture at `shares` from 0 to 100, each with the limits that resampling gives it."""
    array = np.asarray(values, dtype=np.float64)
    resampled = np.percentile(_resampled(array), shares, axis=1)
    return [Estimate(value, *_limits(row)) for value, row in zip(np.percentile(array, shares), resampled, strict=True)]


def _resampled(array: np.ndarray) -> np.ndarray:
    """Samples drawn with replacement, (RESAMPLES, pictures); every time the same ones."""
    return array[np.random.default_rng(0).integers(array.size, size=(RESAMPLES, array.size))]


def _limits(means: np.ndarray) -> np.ndarray:
    """Between which LEVEL of them lie: order statistics, so that infinite values (PSNR of equals) give no NaN."""
    outside = 50 * (1 - LEVEL)
    return np.percentile(means, (outside, 100 - outside), method="nearest")


MIN_SEEDS = 3  # trainings from which their scatter is taken into account; fewer tell little of it


@cache
def _students_t(degrees: int) -> np.ndarray:
    """RESAMPLES values spread as Student's t, out of order; as many draws would move the limits by a tenth."""
    generator = np.random.default_rng(1)
    draws = generator.standard_t(degrees, 1_000 * RESAMPLES)
    spread = np.quantile(np.concatenate([draws, -draws]), (np.arange(RESAMPLES) + 0.5) / RESAMPLES)
    return generator.permutation(spread)


def bootstrap_trainings(values: ArrayLike) -> Estimate:
    """Mean of (trainings, pictures), with limits over resampled pictures and, from MIN_SEEDS, over other trainings.

    A mean over so few trainings is off by their scatter times Student's t: drawing them with replacement would make
    intervals too narrow. A picture without a value in any of them is left out.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[:, ~np.isnan(array).any(0)]
    trainings = len(array)
    if trainings < MIN_SEEDS:
        return bootstrap(array.mean(0))
    pictures = _resampled(array.mean(0)).mean(1)
    scatter = array.mean(1).std(ddof=1) / math.sqrt(trainings)
    others = scatter * _students_t(trainings - 1)
    return Estimate(array.mean(), *_limits(pictures + others))
