"""Where reports go: files, each whole or not at all, and a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icd_lightning.evaluation.report.model import Curve, Panel, Report, Section, Table
from icd_lightning.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console


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


def draw_section(section: Panel | Curve, path: Path) -> Path:
    """Draw what stands below a section's heading, as a PNG of its own; return its path."""
    from icd_lightning.evaluation.report.canvas import draw_body

    write_whole(path, lambda temporary: temporary.write_bytes(draw_body(section).png()))
    return path


def wide_console() -> Console:
    """A console wide enough for our tables where the output is a file, which has no width of its own."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)


def print_table(table: Table, console: Console) -> None:
    """Print the table for a terminal: our rows in colour, best values bold."""
    import rich.table
    from rich import box
    from rich.text import Text

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
