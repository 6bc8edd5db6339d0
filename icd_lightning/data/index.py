"""An index beside each shard, made once: where its samples lie, how large their pictures are, which cannot be used.

With it a training knows before its first step which samples make which batch, and reads each from its place. It costs
one pass over the headers of a tar, its captions and the headers of its pictures, in all processes that there are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from icd_lightning.data.decoding import MIXED, SampleDecoder
from icd_lightning.data.tally import REASONS, NothingToReadError, RejectedError
from icd_lightning.data.tars import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    INDEX,
    LARGE,
    MOMENTS,
    Raw,
    index_shard,
    is_local,
    open_member,
    read_small,
    scan_shard,
)
from icd_lightning.files import write_whole
from icd_lightning.processes import in_processes
from icd_lightning.progress import progress

logger = logging.getLogger(__name__)

MOST_INDEX_BYTES = 1 << 28
READ = (*CAPTION_EXTENSIONS, "json", MOMENTS)  # whole, to make an index
BLOCK = 512  # of a tar
LONGEST = 1 << 30  # bytes of one sample
KINDS = ("pictures", "moments", "moments and text")
PARALLEL = 1 << 26  # bytes of shards from which on several processes pay


class ShardIndex(NamedTuple):
    """One row for each sample of a shard, in order.

    `offset` and `length` int64 (N,): the bytes of the tar that hold its files, headers and all. `size` int32 (N, 2):
    (height, width) of its picture, upright, or of its moments. `reason` int8 (N,): which of REASONS keeps it from being
    used at any resolution, or -1. `kind` is one of KINDS, `damage` says what is wrong with the tar.
    """

    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    size: NDArray[np.int32]
    reason: NDArray[np.int8]
    kind: str
    damage: str = ""


def open_indexes(urls: Sequence[str], caption_field: str | None) -> list[ShardIndex] | None:
    """The indexes of shards; those of local shards are made where they are missing, and kept.

    None if a shard that is elsewhere has none. `caption_field` is that of SampleDecoder.
    """
    opened = partial(_open, caption_field=caption_field)
    elsewhere = [url for url in urls if not is_local(url)]
    if any(url.startswith("pipe:") for url in elsewhere) or (elsewhere and opened(elsewhere[0]) is None):
        return None
    missing = [url for url in urls if is_local(url) and _kept(url, caption_field) is None]
    processes = min(os.cpu_count() or 1, len(missing)) if sum(map(os.path.getsize, missing)) > PARALLEL else 1
    for _ in progress(in_processes(opened, missing, processes), f"indexing {len(missing)} shards", len(missing)):
        pass  # is kept, or made again below
    with ThreadPoolExecutor(16 if elsewhere else 1) as pool:
        found = list(pool.map(opened, urls))
    return None if any(index is None for index in found) else found


def count_samples(path: Path) -> tuple[int, str | None]:
    """How many samples a local shard holds and what is damaged in it, by its index or else by its headers."""
    if (index := _kept(str(path))) is not None:
        return len(index.offset), index.damage or None
    entries, damage = index_shard(path)
    return len(entries), damage


def _open(url: str, caption_field: str | None) -> ShardIndex | None:
    """The index of a shard: as it is kept, or else, of a local one, made and kept; None where there is none."""
    if not is_local(url):
        content = read_small(beside(url), MOST_INDEX_BYTES)
        return None if content is None else _parsed(content, caption_field)
    if (kept := _kept(url, caption_field)) is not None:
        return kept
    index = _made(Path(url), caption_field)
    told = {"caption_field": json.dumps(caption_field), "reasons": " ".join(REASONS), "damage": index.damage}
    arrays = {name: getattr(index, name) for name in ("offset", "length", "size", "reason")}
    content = save(arrays, told | {"kind": index.kind, "shard": _fingerprint(url)})
    for file in _places(url):
        try:
            write_whole(file, partial(Path.write_bytes, data=content))
            return index
        except OSError as error:
            logger.info("the index of %s cannot be kept at %s (%s)", url, file, error)
    return index


def beside(url: str) -> str:
    """Where the index of a shard is kept."""
    return url.removesuffix(".tar") + INDEX


def _places(url: str) -> Iterator[Path]:
    """Where the index of a local shard may be: beside it or, where nobody may write, among the user's caches."""
    yield Path(beside(url))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield cache / "icd_lightning" / (hashlib.sha256(os.path.abspath(url).encode()).hexdigest()[:24] + INDEX)


def _kept(url: str, *caption_field: str | None) -> ShardIndex | None:
    """The index of a local shard, of whatever captions if no field is given; None where there is none that fits."""
    for file in filter(Path.is_file, _places(url)):
        content = file.read_bytes() if file.stat().st_size <= MOST_INDEX_BYTES else b""
        if (index := _parsed(content, *caption_field, shard=_fingerprint(url))) is not None:
            return index
    return None


def _parsed(content: bytes, *caption_field: str | None, shard: str | None = None) -> ShardIndex | None:
    """The index that a file holds; None if it is none, or of another shard or other captions."""
    try:
        arrays = load(content)
        told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        index = ShardIndex(**arrays, kind=told["kind"], damage=told["damage"])
        fits = not caption_field or caption_field == (json.loads(told["caption_field"]),)
        fits = fits and index.kind in KINDS and told["reasons"] == " ".join(REASONS) and shard in (None, told["shard"])
        return index if fits and _holds(index) else None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _holds(index: ShardIndex) -> bool:
    """Whether the columns of an index are as long as each other, and their values such as can be."""
    offset, length, size, reason = index[:4]
    (count,) = offset.shape
    kinds = [array.dtype for array in index[:4]] == [np.int64, np.int64, np.int32, np.int8]
    shapes = (length.shape, size.shape, reason.shape) == ((count,), (count, 2), (count,))
    values = (offset >= 0) & (length >= BLOCK) & (length <= LONGEST) & (reason >= -1) & (reason < len(REASONS))
    return kinds and shapes and bool(values.all() and (size[reason < 0] > 0).all())


def _fingerprint(url: str) -> str:
    """Of the size and the ends of a local shard: changes when it is written anew, not when it is copied."""
    with open(url, "rb") as file:
        first, size = file.read(4096), file.seek(0, 2)
        file.seek(-min(4096, size), 2)
        return f"{size} {hashlib.sha256(first + file.read()).hexdigest()[:24]}"


def _made(path: Path, caption_field: str | None) -> ShardIndex:
    decoder = SampleDecoder(1, caption_field)
    rows: list[tuple[int, int, tuple[int, int], int]] = []
    kinds: set[str] = set()

    def visit(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> None:
        first = min(member.offset for member in members.values())
        last = max(member.offset_data - member.size % -BLOCK + member.size for member in members.values())
        raw: Raw = {"__key__": key, "__url__": str(path)}
        for extension, member in members.items():
            raw[extension] = file = open_member(tar, member) if last - first <= LONGEST else LARGE
            if file is not LARGE and extension not in IMAGE_EXTENSIONS:
                raw[extension] = file.read() if extension in READ else b""
        try:
            sample = decoder.open(raw)
            kinds.add(KINDS[(sample.moments is not None) + (sample.text is not None)])
            rows.append((first, last - first, sample.size, -1))
        except RejectedError as error:
            rows.append((first, min(last - first, LONGEST), (0, 0), REASONS.index(error.reason)))

    damage = scan_shard(path, visit)
    if len(kinds) > 1:
        raise NothingToReadError(MIXED)
    columns = zip(*rows, strict=True) if rows else ([], [], np.zeros((0, 2)), [])
    types = (np.int64, np.int64, np.int32, np.int8)
    arrays = [np.array(column, kind) for column, kind in zip(columns, types, strict=True)]
    return ShardIndex(*arrays, kind=min(kinds, default=KINDS[0]), damage=damage or "")
