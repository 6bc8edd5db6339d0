"""Results for somebody who was not there: a page, a picture and a table in the terminal, all from one `Report`.

A report is plain data, checked when it is made. Importing it loads no library that draws; the figures of notebooks are
in `ablations` and `guidance`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from icd_lightning.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

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

    @classmethod
    def of_columns(
        cls,
        title: str,
        note: str,
        columns: Mapping[str, Sequence[Picture | None]],
        labels: Sequence[str],
        highlight: tuple[int, ...] = (),
    ) -> Panel:
        """From columns by their heads, a picture for each of the rows' labels."""
        rows = zip(labels, zip(*columns.values(), strict=True), strict=True)
        return cls(title, note, tuple(columns), tuple(rows), highlight)


class Style(NamedTuple):
    """How a column is printed: decimals, what is good, and a factor, 100 for per cent.

    Without decimals the largest value has three digits. The best values are marked, and the head gets an arrow.
    """

    digits: int | None = None
    best: Literal["max", "min"] | None = None
    factor: float = 1.0


class Cell(NamedTuple):
    text: str
    best: bool


@dataclass(frozen=True)
class Table:
    """Numbers in columns; None is a gap. `styles` are by column, and may know more columns than there are."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    highlight_rows: tuple[int, ...] = ()
    styles: Mapping[str, Style] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for values in self.rows:
            if len(values) != len(self.header):
                raise ValueError(f"table {self.title!r}: {len(values)} values for {len(self.header)} columns: {values}")

    def is_numeric(self, index: int) -> bool:
        """True for a column of numbers, which is set flush right."""
        values = [row[index] for row in self.rows if row[index] is not None]
        return bool(values) and not any(isinstance(value, str) for value in values)

    def heads(self) -> list[str]:
        """The header, with the unit of per cent, and an arrow where more or less is better."""
        arrows = {"max": "\u00a0↑", "min": "\u00a0↓", None: ""}
        styles = [self.styles.get(name, Style()) for name in self.header]
        units = [" (%)" if style.factor == 100 else "" for style in styles]
        return [n + unit + arrows[style.best] for n, unit, style in zip(self.header, units, styles, strict=True)]

    @property
    def legend(self) -> str:
        """What the marks mean; empty where there are none."""
        good = {self.styles[name].best for name in self.header if name in self.styles}
        parts = [text for key, text in (("max", "↑ higher is better"), ("min", "↓ lower is better")) if key in good]
        return ", ".join([*parts, "best in bold"]) if parts else ""

    def cells(self) -> list[list[Cell]]:
        """Every value as text, rounded as its column is, with the best values of a column marked."""
        columns = []
        for index, name in enumerate(self.header):
            digits, good, factor = self.styles.get(name, Style())
            values = [row[index] for row in self.rows]
            if factor != 1:  # else whole numbers would not stay whole
                values = [v if v is None or isinstance(v, str) else v * factor for v in values]
            means = [math.nan if value is None or isinstance(value, str) else float(value) for value in values]
            numbers = [mean for mean in means if not math.isnan(mean)]
            if digits is None:  # three significant ones of the largest number, at most six decimals
                largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
                digits = 2 if largest == 0 else min(max(2 - math.floor(math.log10(largest)), 0), 6)
            # a mean that reads the same as the best is as good; its interval has no part in that
            winner = f"{(max if good == 'max' else min)(numbers):.{digits}f}" if good and numbers else None
            best = [f"{mean:.{digits}f}" == winner for mean in means]
            columns.append([Cell(format_value(v, digits), b) for v, b in zip(values, best, strict=True)])
        return [list(row) for row in zip(*columns, strict=True)]

    def _repr_markdown_(self) -> str:
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


@dataclass(frozen=True)
class Bars:
    """Bars of a whole in two parts and what lies between them: (label, (first, between, second)), shares of 1.

    In labels a newline starts a second, quieter line.
    """

    title: str
    note: str
    parts: tuple[str, str, str]
    rows: tuple[tuple[str, tuple[float, float, float]], ...]

    def __post_init__(self) -> None:
        for label, shares in self.rows:
            if not (min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6):
                raise ValueError(f"bars {self.title!r}: {label!r} has {shares}, which are not shares of a whole")

    @staticmethod
    def text(share: float) -> str:
        return f"{100 * share:.0f}\u00a0%" if share >= 0.07 else ""


Section = Panel | Table | Curve | Bars


@dataclass(frozen=True)
class Report:
    """A title, big numbers as (value, label), sections in reading order, and facts such as versions and the command."""

    title: str
    subtitle: str
    summary: tuple[tuple[str, str], ...] = ()
    sections: tuple[Section, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


def format_value(value: Value, digits: int) -> str:
    """A value of a table as text: integers whole, floats with `digits` decimals, thousands set apart."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(float(value), "nan")
    return f"{value:,}" if isinstance(value, Integral) else f"{value:,.{digits}f}"


def markdown_table(table: Table) -> str:
    """The table for a README, under its title and with its note below; no text of a cell ends the cell."""
    marks = ["--:" if table.is_numeric(index) else "---" for index in range(len(table.header))]
    lines = [table.heads(), marks, *([cell.text for cell in row] for row in table.cells())]
    whole = ([" ".join(cell.splitlines()).replace("|", "\\|") for cell in line] for line in lines)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in whole)
    return f"**{table.title}**\n\n{rows}\n\n{table.note}\n"


def write_report(
    report: Report, folder: str | Path, *, png_sections: Sequence[Section] | None = None
) -> tuple[Path, Path]:
    """Write report.html (one file, nothing loaded from elsewhere) and report.png to `folder`; return their paths.

    `png_sections` are drawn in the picture in place of the report's own: a README wants fewer rows than a page.
    """
    from icd_lightning.evaluation.report.canvas import draw_report
    from icd_lightning.evaluation.report.page import page

    html, png = Path(folder) / "report.html", Path(folder) / "report.png"
    drawn = report if png_sections is None else replace(report, sections=tuple(png_sections))
    write_whole(html, lambda temporary: temporary.write_text(page(report), encoding="utf-8"))
    write_whole(png, lambda temporary: temporary.write_bytes(draw_report(drawn).png()))
    return html, png


def draw_section(section: Section, path: Path) -> Path:
    """Draw what stands below a section's heading, as a PNG of its own; return its path."""
    from icd_lightning.evaluation.report.canvas import draw_body

    write_whole(path, lambda temporary: temporary.write_bytes(draw_body(section).png()))
    return path


def print_tables(tables: Sequence[Table], console: Console | None = None) -> Console:
    """Print tables for a terminal, our rows in colour, best values bold; return the console.

    By default it is wide enough for them where the output is a file, which has no width of its own.
    """
    import rich.table
    from rich import box
    from rich.console import Console
    from rich.text import Text

    console = console or (Console() if sys.stdout.isatty() else Console(width=120))
    for table in tables:
        note = "\n".join(text for text in (table.note, table.legend) if text)
        out = rich.table.Table(
            title=Text(table.title, "bold"),
            caption=Text(note, "dim") if note else None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for index, head in enumerate(table.heads()):
            out.add_column(Text(head), justify="right" if table.is_numeric(index) else "left", vertical="bottom")
        for index, cells in enumerate(table.cells()):
            style = "cyan" if index in table.highlight_rows else ""
            out.add_row(*(Text(cell.text, "bold" if cell.best else "") for cell in cells), style=style)
        console.print(out)
    return console
