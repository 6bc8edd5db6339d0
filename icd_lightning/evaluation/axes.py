"""What a page and a picture of a `Curve` share: colours, axes, and lines in the unit square."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from icd_lightning.evaluation.report import Curve

LIGHT = {
    "paper": "#ffffff", "ink": "#14171f", "muted": "#586174", "rule": "#e2e5eb", "soft": "#f4f5f8",
    "accent": "#4338ca", "tint": "#edeefd",
}  # fmt: skip
DARK = {
    "paper": "#0e1117", "ink": "#e8eaf0", "muted": "#9aa3b5", "rule": "#2a303c", "soft": "#171b24",
    "accent": "#a5b0ff", "tint": "#1d2040",
}  # fmt: skip
LIGHT_SERIES = ("#4338ca", "#e8590c", "#0b8f6c", "#c2255c", "#1c7ed6", "#7a828f")
DARK_SERIES = ("#a5b0ff", "#ffa94d", "#5fe0b7", "#faa2c1", "#74c0fc", "#c3c9d3")


@dataclass(frozen=True)
class Axis:
    """A range of values with ticks as (value, text)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at `low` and 1 at `high`."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        return ((math.log(value) if self.log else value) - low) / (high - low)


def axes(curve: Curve) -> tuple[Axis, Axis]:
    """The x axis, which ends with the data unless that is marked, and the y axis, which ends at ticks."""
    points = [point for x, y in curve.series.values() for run in _runs(x, y, curve.log_y) for point in run]
    x, y = ([point[i] for point in points] for i in (0, 1))
    return linear_axis(x, tight=not curve.marks), log_axis(y) if curve.log_y else linear_axis(y)


def lines(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[list[list[tuple[float, float]]]]:
    """Each series as unbroken runs of points in the unit square, y upwards."""
    return [
        [[(x_axis.place(a), y_axis.place(b)) for a, b in run] for run in _runs(x, y, curve.log_y)]
        for x, y in curve.series.values()
    ]


def linear_axis(values: Sequence[float], *, tight: bool = False, count: int = 5) -> Axis:
    """About `count` ticks at 1, 2 or 5 times a power of ten."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: give it room
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first, last = (math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9))
    if not tight:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return Axis(low, high, tuple((i * step, f"{i * step:,.{digits}f}") for i in range(first, last + 1)))


def log_axis(values: Sequence[float]) -> Axis:
    """Ticks at powers of ten, or at 1, 2 and 5 times those where the values span less than two of them."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    factors = (1, 2, 5) if high / low < 100 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    marks = [factor * 10.0**power for power in powers for factor in factors]
    bottom = max(mark for mark in marks if mark <= low * (1 + 1e-9))
    top = min(mark for mark in marks if mark >= high * (1 - 1e-9) and mark > bottom)
    stride = max(1, math.ceil(sum(bottom <= mark <= top for mark in marks) / 7))
    ticks = [mark for mark in marks if bottom <= mark <= top][::stride]
    return Axis(bottom, top, tuple((mark, f"{mark:g}") for mark in ticks), log=True)


def _runs(x: Sequence[float], y: Sequence[float], log_y: bool) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if math.isfinite(a) and math.isfinite(b) and (b > 0 or not log_y):
            runs[-1].append((float(a), float(b)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
