"""What others wrote: captions, prompts, names, tables of these. The standard library only: everything may need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from icd_lightning.files import read_csv

CONTROL = {chr(code) for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFD)} - set("\t\n\r")
"""What no text has that is UTF-8 and for people to read; U+FFFD stands for what was not UTF-8."""
MOST_CHARACTERS = 10_000  # of a caption or prompt, of which encoders see some 400 at most


def wrong_with(text: str) -> str:
    """What no caption does, such as to hold control characters; nothing of one that is well."""
    if (not text.isprintable() or "\ufffd" in text) and (odd := set(text) & CONTROL):
        return f"holds {min(odd)!r}; is it UTF-8?"
    return f"has {len(text):,} characters" if len(text) > MOST_CHARACTERS else ""


def check_prompt(prompt: str) -> None:
    """ValueError for what is no text to be read; what a shell gives need not be UTF-8."""
    if wrong := wrong_with(prompt):
        raise ValueError(f"prompt {prompt[:80]!r} {wrong}")


def printable(text: str) -> str:
    """Text from a file as a terminal may be given it: what would control the terminal is written out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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
