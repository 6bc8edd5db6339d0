"""Where pairs come from: shards, Parquet, a table or COCO's annotations beside a folder of pictures.

A source is cut into units, each of which is read on its own, in order, and gives raw samples as shards hold them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.parquet import ParquetFile

from icd_lightning.data.manifest import Manifest, check_shard
from icd_lightning.data.shards import find_shards
from icd_lightning.data.tally import Tally
from icd_lightning.data.tars import IMAGE_EXTENSIONS, MOST_BYTES, Raw, expand, is_local, open_url
from icd_lightning.data.uncounted import read_shard
from icd_lightning.files import read_csv, read_object

ROWS = 1000  # of a table, or of COCO's pictures, in a unit
MOST_TABLE = 1 << 30  # bytes of a CSV or of annotations
PICTURES = ("image", "file_name", "filename", "image_path", "path", "jpg", "png", "img")
CAPTIONS = ("caption", "text", "TEXT", "prompt", "title")
ADDRESSES = ("url", "URL", "image_url")


@dataclass(frozen=True)
class Unit:
    """A part of a source: a shard, a row group of Parquet, or rows `start` to `stop` of a table.

    `stamp` changes with the content: a manifest's sha256, or size and time of a file here; empty for one elsewhere.
    """

    url: str
    start: int = 0
    stop: int = 0
    stamp: str = ""

    @property
    def place(self) -> tuple[str, int, int]:
        return self.url, self.start, self.stop

    @property
    def name(self) -> str:
        return f"{self.url.rpartition('/')[2]}{f':{self.start}' if self.stop else ''}"

    def digest(self, settings: list[Any]) -> str:
        """32 hexadecimal digits of all that its outcome depends on."""
        return hashlib.sha256(json.dumps([asdict(self), settings]).encode()).hexdigest()[:32]


def find_units(inputs: Sequence[str]) -> list[Unit]:
    """All units of shards, folders, patterns, .parquet, .csv and COCO's .json, in order; an error if there are none."""
    return list(chain.from_iterable(map(_units_of, inputs)))


def read_unit(unit: Unit, damage: list[str]) -> Iterator[Raw]:
    """Raw samples of a unit, {"__key__": str, "__url__": str, extension: bytes}; `damage` gets what broke it off."""
    kind = _kind(unit.url)
    if kind is None:
        tally = Tally(stall_timeout=60.0)
        yield from read_shard(unit.url, tally)
        if tally.counts()["broken_shard"]:
            damage.append(f"{unit.url} cannot be read to its end")
        return
    try:
        yield from KINDS[kind][1](unit)
    except Exception as error:  # pyarrow and the drivers of stores have errors of their own
        damage.append(f"{unit.url} cannot be read to its end ({type(error).__name__}: {error})")


def _kind(url: str) -> str | None:
    return next((ending for ending in KINDS if url.lower().endswith(ending)), None)


def _units_of(given: str) -> list[Unit]:
    url = os.path.expanduser(given.removeprefix("file://"))
    urls = _in_folder(Path(url)) if os.path.isdir(url) else [url]
    if all(map(_kind, urls)):
        found = list(chain.from_iterable(map(expand, urls)))
        found = [os.path.abspath(name) if is_local(name) else name for name in found]
        return list(chain.from_iterable(KINDS[_kind(name)][0](name) for name in found))  # type: ignore[index]
    shards = [os.path.abspath(shard) if is_local(shard) else shard for shard in find_shards(given)]
    manifests = Manifest.beside(shards)
    return [Unit(shard, stamp=_stamp(shard, manifests)) for shard in shards]


def _in_folder(folder: Path) -> list[str]:
    """The tables in a folder, by the first kind that is there; the folder itself, of shards, if there is none."""
    for ending in () if any(folder.glob("*.tar")) else KINDS:
        if found := sorted(str(path) for path in folder.glob(f"*{ending}") if path.is_file()):
            return found
    return [str(folder)]


def _stamp(url: str, manifests: dict[Path, Manifest]) -> str:
    if not is_local(url):
        return ""
    manifest = manifests.get(Path(url).parent)
    if manifest and (record := manifest.shards.get(Path(url).name)):
        if problem := check_shard(Path(url), record, level="bytes"):
            raise ValueError(f"{problem}; write or copy the shards again")
        return record.sha256
    about = os.stat(url)
    return f"{about.st_size} {about.st_mtime_ns}"


def _in_parts(url: str, count: int, size: int) -> list[Unit]:
    stamp = _stamp(url, {})
    return [Unit(url, start, min(start + size, count), stamp) for start in range(0, count, size)]


def _sample(url: str, row: int, picture: tuple[str, bytes | None], caption: Any, about: dict[str, Any]) -> Raw:
    """A row as shards hold it. picture: a file's name, for its kind, and its content, None where there is none."""
    name, data = picture
    extension = Path(name).suffix.lower().removeprefix(".")
    raw: Raw = {"__key__": f"{row:09d}", "__url__": url, "json": json.dumps(about, default=str).encode()}
    if data is not None:
        raw[extension if extension in IMAGE_EXTENSIONS else IMAGE_EXTENSIONS[0]] = data  # Pillow looks at the content
    return raw | ({"txt": caption.encode()} if isinstance(caption, str) else {})


def _file(folder: Path, name: Any) -> tuple[str, bytes | None]:
    """A picture's name and content; None for one that is not there, not in the folder, far too large, or no name."""
    name, data = str(name)[:1000], None  # which may be an array of anything
    path = folder / name
    with suppress(OSError, ValueError):  # of names too long, or with a NUL in them
        inside = path.resolve().is_relative_to(folder.resolve())  # a table by somebody else names what it likes
        fits = inside and path.is_file() and path.stat().st_size <= MOST_BYTES
        data = path.read_bytes() if fits else None
    return name, data


def _column(names: Iterable[str], wanted: Sequence[str], what: str, url: str) -> str:
    there = list(names)
    if (found := next((name for name in wanted if name in there), None)) is None:
        remedy = f"name its column {wanted[0]}"
        if what == "picture" and set(ADDRESSES) & set(there):
            remedy = "it holds addresses alone: download them first, e.g. by img2dataset, and curate its shards"
        raise ValueError(f"{url} has no column of a {what} (it has {', '.join(there)}): {remedy}")
    return found


def _table_units(url: str) -> list[Unit]:
    rows = _rows(url)
    first = next(rows, {})
    _column(first, PICTURES, "picture", url), _column(first, CAPTIONS, "caption", url)
    return _in_parts(url, 1 + sum(1 for _ in rows), ROWS)


def _rows(url: str) -> Iterator[dict[str, Any]]:
    if not is_local(url):
        raise ValueError(f"{url} is elsewhere: copy it and its pictures to this machine")
    yield from read_csv(Path(url))


def _read_table(unit: Unit) -> Iterator[Raw]:
    folder = Path(unit.url).parent
    for row, about in enumerate(islice(_rows(unit.url), unit.start, unit.stop), unit.start):
        picture = _column(about, PICTURES, "picture", unit.url)
        caption = _column(about, CAPTIONS, "caption", unit.url)
        text = None if None in about else about[caption]  # a comma in it, unquoted, would end it
        yield _sample(unit.url, row, _file(folder, about[picture]), text, about)


@lru_cache(1)  # units of one file follow each other
def _coco(url: str) -> tuple[Path, list[dict[str, Any]]]:
    path = Path(url)
    content = read_object(path, MOST_TABLE)
    captions = defaultdict(list)
    try:
        for note in content["annotations"]:
            captions[note["image_id"]].append(str(note["caption"]))
        images = [image | {"captions": captions[image["id"]]} for image in content["images"]]
        first = str(images[0]["file_name"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{url} holds no captions as COCO's annotations do ({error!r})") from error
    places = (path.parent, path.parent.parent / path.stem.rpartition("_")[2], path.parent / "images")
    folder = next((one for one in places if (one / first).is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{first} of {url} is in none of {', '.join(map(str, places))}: put the pictures there")
    return folder, images


def _read_coco(unit: Unit) -> Iterator[Raw]:
    folder, images = _coco(unit.url)
    for row, image in enumerate(images[unit.start : unit.stop], unit.start):
        caption = next(iter(image["captions"]), None)
        yield _sample(unit.url, row, _file(folder, image.get("file_name")), caption, image)


def _parquet_units(url: str) -> list[Unit]:
    with open_url(url) as file:
        table = _parquet(file, url)
        _column(table.schema_arrow.names, PICTURES, "picture", url)
        _column(table.schema_arrow.names, CAPTIONS, "caption", url)
        stamp = _stamp(url, {})
        return [Unit(url, group, group + 1, stamp) for group in range(table.num_row_groups)]


def _parquet(file: Any, url: str) -> Any:
    try:
        return ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{url} is no Parquet file ({error})") from error


def _read_parquet(unit: Unit) -> Iterator[Raw]:
    """Rows of a row group. A picture is bytes, the path of a file beside the table, or both, as `datasets` has it."""
    with open_url(unit.url) as file:
        table = _parquet(file, unit.url)
        picture = _column(table.schema_arrow.names, PICTURES, "picture", unit.url)
        caption = _column(table.schema_arrow.names, CAPTIONS, "caption", unit.url)
        rows = chain.from_iterable(
            batch.to_pylist() for batch in table.iter_batches(batch_size=64, row_groups=[unit.start])
        )
        for row, about in enumerate(rows):
            found, text = about.pop(picture), about.get(caption)
            found = found if isinstance(found, dict) else {("bytes" if isinstance(found, bytes) else "path"): found}
            data, name = found.get("bytes"), found.get("path") or ""
            if data is None and is_local(unit.url) and name:
                name, data = _file(Path(unit.url).parent, name)
            yield _sample(unit.url, row, (name, data), text, about)


KINDS: dict[str, tuple[Callable[[str], list[Unit]], Callable[[Unit], Iterator[Raw]]]] = {
    ".parquet": (_parquet_units, _read_parquet),
    ".csv": (_table_units, _read_table),
    ".json": (lambda url: _in_parts(url, len(_coco(url)[1]), ROWS), _read_coco),
}
"""By the end of a name: how a source is cut into units, and how one is read. Whatever else there is are shards."""
