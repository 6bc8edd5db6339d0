"""Figures by matplotlib: one look for all, axes with units, error bars from the bootstrap, and a report's curves."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO, StringIO
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from icd_lightning.evaluation.report import Curve
from icd_lightning.evaluation.statistics import Estimate

COLORS = {
    "paper": "#ffffff", "ink": "#14171f", "muted": "#586174", "rule": "#e2e5eb", "soft": "#f4f5f8",
    "accent": "#4338ca", "tint": "#edeefd",
}  # fmt: skip
SERIES = ("#4338ca", "#e8590c", "#0b8f6c", "#c2255c", "#1c7ed6", "#7a828f")
FAMILY = "DejaVu Sans"  # comes with matplotlib: the same on every machine, and with Greek and arrows
WIDTH = 7.0  # inches: of a page's text
PIXELS = 72  # dots an inch at which a point is a pixel: a report's sizes are all pixels

PRINTED = rc_context(
    {
        "font.family": FAMILY,
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": COLORS["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLORS["rule"],
        "grid.linewidth": 0.6,
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "xtick.labelcolor": COLORS["ink"],
        "ytick.labelcolor": COLORS["ink"],
        "text.color": COLORS["ink"],
        "axes.labelcolor": COLORS["ink"],
        "lines.linewidth": 1.4,
        "lines.markersize": 4.5,
        "errorbar.capsize": 2,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "figure.facecolor": COLORS["paper"],
    }
)
"""Decorates whatever draws a figure as one would print it."""
REPORTED = {
    "font.family": FAMILY,
    "text.parse_math": False,  # what users write is shown as it is
    "text.hinting": "no_hinting",  # letters as wide as `text_width` says
    "axes.autolimit_mode": "round_numbers",
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "text.color": COLORS["ink"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",  # the page's own letters
}
"""Settings of what stands in a report."""


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
    figure = Sheet(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


class Look(NamedTuple):
    """How a series is told from others, in print without colours too."""

    color: str
    marker: str
    line: str = "-"


LOOKS = tuple(map(Look, SERIES, "osDv^X", ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), "-")))


def points(axes: Axes, x: Sequence[float], y: Sequence[float], look: Look, *, label: str = "") -> None:
    """Points joined by a line; a coordinate that is an `Estimate` has the bar of its interval."""
    bars = []
    for values in (x, y):
        limits = [(v - v.low, v.high - v) if isinstance(v, Estimate) else (0.0, 0.0) for v in values]
        down_and_up = np.nan_to_num(np.array(limits, dtype=float).T)  # one picture alone has no interval
        bars.append(down_and_up if down_and_up.any() else None)
    style = {"color": look.color, "ecolor": (look.color, 0.55), "marker": look.marker, "linestyle": look.line}
    axes.errorbar(list(map(float, x)), list(map(float, y)), bars[1], bars[0], label=label, elinewidth=0.9, **style)


class Font(NamedTuple):
    """How letters look: size in pixels, colour, weight; and on which side of their place they stand."""

    size: float
    color: str = "ink"
    weight: str = "normal"
    align: str = "left"


@lru_cache(maxsize=8192)
def text_width(text: str, font: Font) -> float:
    """Of a line of text, in pixels."""
    properties = FontProperties(family=FAMILY, size=font.size, weight=font.weight)
    return text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]


def curve_pixels(curve: Curve, width: int) -> NDArray[np.uint8]:
    """The curve with the names of its series below, as RGBA pixels (H, W, 4), transparent around what is drawn."""
    size = 20
    cell = max(text_width(name, Font(size)) for name in curve.series) + 3.6 * size
    columns = max(1, min(len(curve.series), int(width / cell)))
    height = 440 + 34 * math.ceil(len(curve.series) / columns)
    with rc_context(REPORTED):
        figure = curve_figure(curve, width, height, size)
        handles, names = figure.axes[0].get_legend_handles_labels()
        by_row = [index for column in range(columns) for index in range(column, len(names), columns)]
        figure.legend(
            [handles[index] for index in by_row],
            [names[index] for index in by_row],
            loc="outside lower left",
            ncols=columns,
            frameon=False,
            fontsize=size,
            handlelength=1.2,
            borderaxespad=0,
            borderpad=0.2,
        )
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def curve_svg(curve: Curve, colors: dict[str, str]) -> str:
    """The curve without its names as an element <svg>; `colors` replaces hex colours by what CSS understands."""
    buffer = StringIO()
    with rc_context({**REPORTED, "svg.hashsalt": curve.title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        curve_figure(curve, 520, 312, 13).savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # numbered anew in each figure
    return re.sub(
        r'style="[^"]*"', lambda style: re.sub(r"#\w{6}", lambda hex: colors.get(hex[0], hex[0]), style[0]), svg
    )


def curve_figure(curve: Curve, width: int, height: int, size: float) -> Figure:
    """Horizontal rules with their values, the name of the y axis above them; sizes in pixels."""
    figure = Figure(figsize=(width / PIXELS, height / PIXELS), dpi=PIXELS)
    figure.set_layout_engine("constrained", w_pad=1 / PIXELS, h_pad=size / 3 / PIXELS)
    axes = figure.subplots()
    for index, name in enumerate(curve.series):
        _draw_line(axes, curve, index, name, size / 7)
    smallest, largest = axes.dataLim.intervaly
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10])
    if curve.log_y:
        axes.set_yscale("log")
        if not 0 < smallest <= largest < 4 * smallest:  # a power of two or more lies between them
            ticks = LogLocator(subs=(1, 2, 5) if 0 < largest < 100 * smallest else (1,))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.ticklabel_format(style="plain", useOffset=False)
    axes.yaxis.set_major_locator(ticks)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.autoscale()
    first, last = axes.dataLim.intervalx
    if not curve.marks and -math.inf < first < last < math.inf:  # a line ends with its data
        axes.set_xlim(first, last)
    axes.grid(axis="y", color=COLORS["rule"], linewidth=size / 13)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=size, labelcolor=COLORS["muted"], pad=size / 2)
    axes.set_xlabel(curve.x_label, color=COLORS["muted"], fontsize=size, labelpad=size / 2)
    figure.suptitle(curve.y_label, x=0, ha="left", color=COLORS["muted"], fontsize=size)
    return figure


def _draw_line(axes: Axes, curve: Curve, index: int, name: str, width: float) -> None:
    xy = np.array(curve.series[name], dtype=float)
    xy[:, ~np.isfinite(xy).all(0) | (curve.log_y & (xy[1] <= 0))] = np.nan  # a gap
    number, mark = curve.look(index)
    color = SERIES[number]
    style = {"color": color, "linewidth": width, "solid_capstyle": "round", "clip_on": False, "label": name}
    if mark:
        face = COLORS["paper"] if mark == "ring" else color
        style |= {"marker": "s" if mark == "square" else "o", "markersize": 4.6 * width}
        style |= {"markerfacecolor": face, "markeredgewidth": width}
    else:
        known = np.pad(np.isfinite(xy[0]), 1)
        alone = xy[:, known[1:-1] & ~known[:-2] & ~known[2:]]  # a point without neighbours makes no line
        if alone.size:
            axes.plot(*alone, "o", color=color, markersize=2 * width, markeredgewidth=0, clip_on=False)
    axes.plot(*xy, **style)
