"""CSV tables of pictures, captions and edits as rows. The standard library only: commands read them early."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

ALIASES = {"file_name": "image", "old_caption": "source", "edited_caption": "target"}
"""What the reference's table of edits calls our columns."""


def edit_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV of edits: image, source, target and, where there are such columns, blended_words and output.

    The reference's names file_name, old_caption and edited_caption are as good.
    """
    rows = csv_rows(file, (), ALIASES)
    columns = rows[0].keys()
    if "image" not in columns:
        raise ValueError(f"{file} has no column image (or file_name), only {', '.join(columns)}")
    return rows


def csv_rows(file: Path, columns: Sequence[str], aliases: dict[str, str] | None = None) -> list[dict[str, str]]:
    """Rows of a CSV with a heading, cells without spaces around them; ValueError where one of `columns` is missing."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give a CSV, or COCO's annotations as JSON")
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened, skipinitialspace=True)
            rows, heading = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as a CSV file in UTF-8 ({error})") from error
    if missing := [name for name in columns if name not in heading]:
        raise ValueError(f"{file} has no column {missing[0]!r}, only {', '.join(heading) or 'none'}")
    if not rows:
        raise ValueError(f"{file} has no rows below its heading")
    names = aliases or {}
    return [{names.get(key, key): (row[key] or "").strip() for key in heading} for row in rows]
