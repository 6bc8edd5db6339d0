"""Files that are whole or not there; the standard library only, since everything may need it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

T = TypeVar("T")


def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` make a file under another name, then rename it: nobody ever finds half a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid4().hex}.tmp")
    try:
        result = write(temporary)
        os.replace(temporary, path)
        return result
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | Path) -> Iterator[Path]:
    """An empty folder whose files and folders, if all goes well, go into `folder`, whose other files stay.

    No reader ever finds half a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write to {folder}: that is a file, give a folder")
    temporary = folder.with_name(f".{folder.name}-{uuid4().hex}")  # beside its goal, where a rename is one atomic step
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not folder.exists():
            os.rename(temporary, folder)
            return
        for file in [path for path in temporary.rglob("*") if path.is_file()]:
            place = folder / file.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(file: Path, text: str) -> None:
    """Write text, whole or not at all."""
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all; what JSON does not know becomes text."""
    write_text(file, json.dumps(value, indent=2, default=str) + "\n")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError that name it."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}")
    return parse_object(file.read_bytes(), str(file))


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; ValueError that says of `what` the text is."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} holds {type(content).__name__}, not a JSON object")
    return content
