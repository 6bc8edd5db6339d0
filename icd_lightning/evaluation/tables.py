"""CSV tables of pictures, captions and edits as rows. The standard library only: commands read them early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from icd_lightning.files import read_csv
from icd_lightning.texts import wrong_with

ALIASES = {"file_name": "image", "old_caption": "source", "edited_caption": "target"}
"""What the reference's table of edits calls our columns."""
READ = ("image", "caption", "source", "target", "output", "blended_words")


def csv_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV with a heading, cells without spaces around them.

    ValueError where one of `columns` is missing, or empty in a row, and for a cell of READ that is no text.
    """
    rows = list(read_csv(file))
    if not rows:
        raise ValueError(f"{file} has no rows below a heading: give it columns {', '.join(columns)}")
    names = {name: ALIASES.get(name, name) for name in rows[0] if name is not None}
    for column in columns:
        also = "".join(f" (or {alias})" for alias, name in ALIASES.items() if name == column)
        if column not in names.values():
            raise ValueError(f"{file} has no column {column}{also}, only {', '.join(names)}")
        if list(names.values()).count(column) > 1:
            raise ValueError(f"{file} has two columns {column}{also}: leave one")
    return [_cells(row, names, columns, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def _cells(row: Mapping[str, str], names: Mapping[str, str], columns: Sequence[str], where: str) -> dict[str, str]:
    """A row by our names for its columns; ValueError, which says where, for what is wrong with it."""
    if None in row:  # what DictReader has no name for
        raise ValueError(f"{where} has more cells than the heading: quote a cell with a comma")
    cells = {name: (row[key] or "").strip() for key, name in names.items()}
    for column in columns:
        if not cells[column]:
            raise ValueError(f"{where}: {column} is empty")
    for column in READ:
        if wrong := wrong_with(cells.get(column, "")):
            raise ValueError(f"{where}: {column} {wrong}")
    return cells
