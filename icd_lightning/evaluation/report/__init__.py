"""Results for somebody who was not there: a page, a picture and a table in the terminal, all from one `Report`.

Importing it loads no library that draws; the figures of notebooks are in `ablations` and `guidance`.
"""

from icd_lightning.evaluation.report.model import (
    MAX_MARKED,
    MAX_SERIES,
    Curve,
    Panel,
    Report,
    Section,
    Table,
    Value,
    markdown_table,
)
from icd_lightning.evaluation.report.output import draw_section, print_table, wide_console, write_report

__all__ = [
    "MAX_MARKED",
    "MAX_SERIES",
    "Curve",
    "Panel",
    "Report",
    "Section",
    "Table",
    "Value",
    "draw_section",
    "markdown_table",
    "print_table",
    "wide_console",
    "write_report",
]
