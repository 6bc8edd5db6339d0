"""A report as plain data: panels of pictures, tables and curves, checked when they are made. Draws nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Value = str | float | int | None

MISSING = "–"  # noqa: RUF001  an en dash, as printed tables have it
MAX_SERIES = 6  # as many colours as the eye keeps apart
MARKS = ("disc", "ring", "square")
MAX_MARKED = MAX_SERIES * len(MARKS)


@dataclass(frozen=True)
class Panel:
    """Pictures uint8 (H, W, 3) in rows under column heads; None leaves a hole.

    In labels and heads a newline starts a second, quieter line. `highlight` names the columns that are ours.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Picture | None, ...]], ...]
    highlight: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for label, pictures in self.rows:
            if len(pictures) != len(self.columns):
                raise ValueError(
                    f"panel {self.title!r}: row {label!r} has {len(pictures)} pictures for {len(self.columns)} "
                    "columns; use None for a hole"
                )


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers in columns; None is a gap.

    `digits` gives each column's decimals (None: three significant digits of its largest value), `best` says per column
    whether "max" or "min" is good: its best values are marked and the head gets an arrow.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    highlight_rows: tuple[int, ...] = ()
    digits: tuple[int | None, ...] | None = None
    best: tuple[Literal["max", "min"] | None, ...] | None = None

    def __post_init__(self) -> None:
        for values in filter(None, (*self.rows, self.digits, self.best)):
            if len(values) != len(self.header):
                raise ValueError(f"table {self.title!r}: {len(values)} values for {len(self.header)} columns: {values}")

    def is_numeric(self, index: int) -> bool:
        """True for a column of numbers, which is set flush right."""
        values = [row[index] for row in self.rows if row[index] is not None]
        return bool(values) and not any(isinstance(value, str) for value in values)

    def heads(self) -> list[str]:
        """The header, with an arrow where more or less is better."""
        arrows = {"max": "\u00a0↑", "min": "\u00a0↓", None: ""}
        best = self.best or (None,) * len(self.header)
        return [head + arrows[good] for head, good in zip(self.header, best, strict=True)]

    @property
    def legend(self) -> str:
        """What the marks mean; empty where there are none."""
        good = set(self.best or ())
        parts = [text for key, text in (("max", "↑ higher is better"), ("min", "↓ lower is better")) if key in good]
        return ", ".join([*parts, "best in bold"]) if parts else ""

    def cells(self) -> list[list[Cell]]:
        """Every value as text, rounded as its column is, with the best values of a column marked."""
        columns = [self._column_cells(index) for index in range(len(self.header))]
        return [list(row) for row in zip(*columns, strict=True)]

    def _column_cells(self, index: int) -> list[Cell]:
        values = [row[index] for row in self.rows]
        means = [math.nan if value is None or isinstance(value, str) else float(value) for value in values]
        numbers = [mean for mean in means if not math.isnan(mean)]
        digits = self.digits[index] if self.digits else None
        digits = _digits(numbers) if digits is None else digits
        good = self.best[index] if self.best else None
        # a mean that reads the same as the best is as good; its interval has no part in that
        winner = f"{(max if good == 'max' else min)(numbers):.{digits}f}" if good and numbers else None
        return [
            Cell(format_value(value, digits), best=f"{mean:.{digits}f}" == winner)
            for value, mean in zip(values, means, strict=True)
        ]

    def _repr_markdown_(self) -> str:
        """What a notebook shows."""
        return markdown_table(self)


@dataclass(frozen=True)
class Curve:
    """Lines over one x axis: name -> (x values, y values). Values that are not finite, or not above 0 on a log axis,
    leave a gap. With `marks` each point is marked, and colours come again with another mark."""

    title: str
    note: str
    x_label: str
    y_label: str
    series: dict[str, tuple[Sequence[float], Sequence[float]]]
    log_y: bool = False
    marks: bool = False

    def __post_init__(self) -> None:
        most = MAX_MARKED if self.marks else MAX_SERIES
        if not 1 <= len(self.series) <= most:
            raise ValueError(f"curve {self.title!r}: {len(self.series)} series; show 1 to {most} in one plot")

    def look(self, index: int) -> tuple[int, str]:
        """Number of its colour and mark of a series; no mark, "", on plain lines."""
        return index % MAX_SERIES, MARKS[index // MAX_SERIES] if self.marks else ""


Section = Panel | Table | Curve


@dataclass(frozen=True)
class Report:
    """A title, big numbers as (value, label), sections in reading order, and facts such as versions and the command."""

    title: str
    subtitle: str
    summary: tuple[tuple[str, str], ...] = ()
    sections: tuple[Section, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


def markdown_table(table: Table) -> str:
    """The table for a README, under its title and with its note below."""
    marks = ["--:" if table.is_numeric(index) else "---" for index in range(len(table.header))]
    lines = [table.heads(), marks, *([cell.text for cell in row] for row in table.cells())]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{table.title}**\n\n{rows}\n\n{table.note}\n"


def format_value(value: Value, digits: int) -> str:
    """A value of a table as text: integers whole, floats with `digits` decimals, thousands set apart."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(float(value), "nan")
    return f"{value:,}" if isinstance(value, Integral) else f"{value:,.{digits}f}"


def _digits(numbers: Sequence[float]) -> int:
    """Decimals that leave three significant digits of the largest number, at most six."""
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    return 2 if largest == 0 else min(max(2 - math.floor(math.log10(largest)), 0), 6)
