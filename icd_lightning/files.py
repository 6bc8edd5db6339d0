"""Files that are whole or not there; the standard library only, since everything may need it."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import singledispatch
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

T = TypeVar("T")


@singledispatch  # data/remote.py has its own for paths that are not on this machine
def write_whole(path: Path, write: Callable[[Path], T]) -> T:
    """Let `write` make a file under another name, then rename it: nobody ever finds half a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid4().hex}.tmp")
    try:
        with room_for(path):
            result = write(temporary)
        os.replace(temporary, path)
        return result
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Name what is written in the system's error of a full disk, which names nothing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(f"cannot write {path}: its disk is full, make room or name another place") from error


@singledispatch
def remove_tree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


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
        with room_for(folder):
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


def cache_folder() -> Path:
    """Where this package keeps what can be made or fetched again; OSError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "icd_lightning"
    except RuntimeError as error:
        raise OSError("this user has no home to keep files in: name a folder by XDG_CACHE_HOME") from error


def write_text(file: Path, text: str) -> None:
    write_whole(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(file: Path, value: Any) -> None:
    """Write JSON, whole or not at all; what JSON does not know becomes text."""
    write_text(file, json.dumps(value, indent=2, default=str) + "\n")


def check_place(path: Path) -> None:
    """OSError where no file can be made, as far as its folders tell: said before work is done for it."""
    folder = next(one for one in path.absolute().parents if one.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        reason = "you may not write there" if folder.is_dir() else "that is a file"
        raise OSError(f"cannot write {path} into {folder}: {reason}, name another place")


def check_folder(folder: Path) -> None:
    """OSError where no folder of results can be kept; see `check_place`."""
    check_place(folder / "results")


def as_seen_here(value: T) -> T | str:
    """The path of what is there, however it was spelt, from the working folder if it is in it; anything else as is."""
    if not (isinstance(value, str) and os.path.exists(value)):
        return value
    place = Path(os.path.abspath(value))
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


def inside(name: str) -> Path:
    """A name in a file that somebody else wrote: relative; ValueError for one that leads out of the file's folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} is not in the folder of what names it")
    return path


def check_file(file: Path) -> None:
    """FileNotFoundError unless this is a file: a pipe would be waited for, and some devices have no end."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file" if file.exists() else f"there is no {file}")


def read_bounded(file: Path, most: int = 64 << 20) -> str:
    """The text of a file; FileNotFoundError or ValueError, which name it, if it is none or has over `most` bytes."""
    check_file(file)
    if file.stat().st_size > most:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than the {most:,} that such a file may have")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error})") from error


def read_object(file: Path, most: int = 64 << 20) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError that name it."""
    return parse_object(read_bounded(file, most), str(file))


def read_csv(file: Path) -> Iterator[dict[str, str]]:
    """Rows below the heading of a CSV, by its names without spaces around; None names what a row has beyond them.

    What is not UTF-8 becomes U+FFFD, which `texts.wrong_with` finds. OSError or ValueError, which name the file, for
    what is no CSV, or has two columns of one name.
    """
    check_file(file)
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as opened:
            reader = csv.DictReader(opened, skipinitialspace=True, strict=True)
            reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
            if twice := next((name for name in names if name and names.count(name) > 1), None):
                raise ValueError(f"{file} has two columns {twice}: leave one")
            yield from reader
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read as a CSV file (line {reader.line_num}: {error})") from error


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; ValueError that says of `what` the text is."""
    try:
        content = json.loads(text, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} holds {type(content).__name__}, not a JSON object")
    return content


def _integer(text: str) -> int:
    if len(text) > 300:
        raise ValueError(f"a number of {len(text)} digits, {text[:9]}...")  # no float could hold it
    return int(text)


def read_yaml(file: Path) -> Any:
    """What a YAML file holds; FileNotFoundError or ValueError, which name it, for one that is none or far too large."""
    import yaml

    try:
        text = read_bounded(file, 1 << 20)
        if _expanded(yaml.compose(text, yaml.SafeLoader), {}) > 100_000:
            raise ValueError("its aliases stand for more than 100,000 values")
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply for a YAML file") from error
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(reason if str(file) in reason else f"{file} is no YAML file ({reason})") from error


def _expanded(node: Any, known: dict[int, float]) -> float:
    """How many values a YAML node stands for, aliases written out; infinitely many if it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = getattr(node, "value", ())
        parts = inner if isinstance(inner, list) else ()
        flat = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_expanded(one, known) for one in flat)
    return known[id(node)]
