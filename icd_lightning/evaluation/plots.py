"""Figures as one would print them: one look, axes with units, error bars from the bootstrap. The home of matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icd_lightning.evaluation.axes import LIGHT, LIGHT_SERIES
from icd_lightning.evaluation.statistics import Estimate

WIDTH = 7.0
"""Inches: of a page's text."""
PRINTED = rc_context(
    {
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": LIGHT["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["rule"],
        "grid.linewidth": 0.6,
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.labelcolor": LIGHT["ink"],
        "ytick.labelcolor": LIGHT["ink"],
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["ink"],
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "errorbar.capsize": 2,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "figure.facecolor": "white",
    }
)
"""Decorates whatever draws."""


class Sheet(Figure):
    """A figure that shows itself in a notebook, whatever the backend."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi=160)
        return buffer.getvalue()


def sheet(
    columns: int = 1, rows: int = 1, *, height: float, width: float = WIDTH, **options
) -> tuple[Sheet, list[Axes]]:
    """A sheet of this size in inches, and its axes row by row; options are those of `Figure.subplots`."""
    made = Sheet(figsize=(width, height), layout="constrained")
    return made, list(made.subplots(rows, columns, squeeze=False, **options).flat)


class Look(NamedTuple):
    """How a series is told from others, in print without colours too."""

    color: str
    marker: str
    line: str = "-"


LOOKS = tuple(map(Look, LIGHT_SERIES, "osDv^X", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), "-")))


def points(axes: Axes, x: Sequence[float], y: Sequence[float], look: Look, *, label: str = "") -> None:
    """Points joined by a line; a coordinate that is an `Estimate` has the bar of its interval."""
    axes.errorbar(
        list(map(float, x)),
        list(map(float, y)),
        xerr=_bars(x),
        yerr=_bars(y),
        color=look.color,
        ecolor=(look.color, 0.55),
        marker=look.marker,
        linestyle=look.line,
        label=label,
        elinewidth=0.9,
    )


def _bars(values: Iterable[float]) -> np.ndarray | None:
    """From each mean down and up to its limits, (2, N); None where no value has any."""
    limits = [(v - v.low, v.high - v) if isinstance(v, Estimate) else (0.0, 0.0) for v in values]
    bars = np.nan_to_num(np.array(limits, dtype=float).T)  # one picture alone has no interval
    return bars if bars.any() else None
