"""CSV tables of pictures, captions and edits as rows. The standard library only: commands read them early."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

ALIASES = {"file_name": "image", "old_caption": "source", "edited_caption": "target"}
"""What the reference's table of edits calls our columns."""


def csv_rows(file: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV with a heading, cells without spaces around them.

    ValueError where one of `columns` is missing, or empty in a row.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give a CSV, or COCO's annotations as JSON")
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened, skipinitialspace=True)
            rows, heading = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a CSV file in UTF-8 ({error})") from error
    names = {name: ALIASES.get(name, name) for name in heading}
    for column in columns:
        if column not in names.values():
            also = "".join(f" (or {alias})" for alias, name in ALIASES.items() if name == column)
            raise ValueError(f"{file} has no column {column}{also}, only {', '.join(heading) or 'none'}")
    if not rows:
        raise ValueError(f"{file} has no rows below its heading")
    for number, row in enumerate(rows):
        if None in row:  # what DictReader has no name for
            raise ValueError(f"{file}, row {number + 1} has more cells than the heading: quote a cell with a comma")
    rows = [{name: (row[key] or "").strip() for key, name in names.items()} for row in rows]
    for number, row in enumerate(rows):
        for column in columns:
            if not row[column]:
                raise ValueError(f"{file}, row {number + 1}: {column} is empty")
    return rows
