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
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

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
from icd_lightning.files import cache_folder, write_whole
from icd_lightning.processes import in_processes
from icd_lightning.progress import progress
from icd_lightning.texts import printable

logger = logging.getLogger(__name__)

VERSION = "2"  # of what an index says; raised when a decoder judges otherwise
MOST_INDEX_BYTES = 1 << 28
READ_WHOLE = (*CAPTION_EXTENSIONS, "json", MOMENTS)
BLOCK = 512  # of a tar
LONGEST = 1 << 30  # bytes of one sample
KINDS = ("pictures", "moments", "moments and text")
BYTES_FOR_PROCESSES = 1 << 26  # of shards from which on several processes pay


class ShardIndex(NamedTuple):
    """One row for each sample of a shard, in order.

    `offset` and `length` int64 (N,): the bytes of the tar that hold its files, headers and all. `check` uint32 (N,):
    the crc32 of its first header. `size` int32 (N, 2): (height, width) of its picture, upright, or of its moments.
    `reason` int8 (N,): which of REASONS keeps it from being used at any resolution, or -1. `kind` is one of KINDS,
    `damage` says what is wrong with the tar.
    """

    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    check: NDArray[np.uint32]
    size: NDArray[np.int32]
    reason: NDArray[np.int8]
    kind: str
    damage: str = ""


COLUMNS = {"offset": np.int64, "length": np.int64, "check": np.uint32, "size": np.int32, "reason": np.int8}


def open_indexes(urls: Sequence[str], caption_field: str | None) -> list[ShardIndex] | None:
    """The indexes of shards; those of local shards are made where they are missing, and kept.

    None if a shard that is elsewhere has none, which is logged. `caption_field` is that of SampleDecoder.
    """
    elsewhere = [url for url in urls if not is_local(url)]
    if any(url.startswith("pipe:") for url in elsewhere):
        return None
    with ThreadPoolExecutor(16) as pool:
        first = [read_index(url, caption_field) for url in elsewhere[:1]]
        rest = pool.map(partial(read_index, caption_field=caption_field), elsewhere[1:]) if all(first) else []
        found = dict(zip(elsewhere, [*first, *rest], strict=False))
    if lacking := [url for url, index in found.items() if index is None]:
        logger.warning("there is no %s that fits: shards are not indexed", beside(lacking[0], caption_field))
        return None
    found |= {url: read_index(url, caption_field) for url in urls if is_local(url)}
    missing = [url for url in urls if found[url] is None]
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = min(processes, len(missing)) if sum(map(os.path.getsize, missing)) > BYTES_FOR_PROCESSES else 1
    made = in_processes(partial(make_index, caption_field=caption_field), missing, processes)
    found |= zip(missing, progress(made, f"indexing {len(missing)} shards", len(missing)), strict=True)
    return [found[url] for url in urls]


def count_samples(path: Path) -> tuple[int, str | None]:
    """How many samples a local shard holds and what is damaged in it, by its index or else by its headers."""
    if (index := read_index(str(path), None)) is not None:
        return len(index.offset), index.damage or None
    entries, damage = index_shard(path)
    return len(entries), damage


def beside(url: str, caption_field: str | None = None) -> str:
    """Where the index of a shard is kept; one of other captions has a file of its own."""
    mark = "" if caption_field is None else f".{hashlib.sha256(caption_field.encode()).hexdigest()[:8]}"
    return url.removesuffix(".tar") + mark + INDEX


def read_index(url: str, caption_field: str | None) -> ShardIndex | None:
    if not is_local(url):
        content = read_small(beside(url, caption_field), MOST_INDEX_BYTES)
        return None if content is None else _parse(content, caption_field)
    for file in _places(url, caption_field):
        with suppress(OSError):  # there is none, or not for us
            if file.stat().st_size <= MOST_INDEX_BYTES and file.is_file():
                index = _parse(file.read_bytes(), caption_field, shard=_fingerprint(url))
                if index is not None:
                    return index
    return None


def make_index(url: str, caption_field: str | None) -> ShardIndex:
    index = _scan(Path(url), caption_field)
    if not len(index.offset):  # an empty shard, or no shard at all, beside which nothing of ours belongs
        return index
    told = {"version": VERSION, "caption_field": json.dumps(caption_field), "reasons": " ".join(REASONS)}
    told |= {"kind": index.kind, "damage": index.damage, "shard": _fingerprint(url)}
    content = save({name: getattr(index, name) for name in COLUMNS}, told)
    for file in _places(url, caption_field):
        try:
            write_whole(file, partial(Path.write_bytes, data=content))
            break
        except OSError as error:
            logger.debug("the index of %s cannot be kept at %s (%s)", url, file, error)
    return index


def _places(url: str, caption_field: str | None) -> Iterator[Path]:
    """Where the index of a local shard may be: beside it or, where nobody may write, among the user's caches."""
    name = beside(url, caption_field)
    yield Path(name)
    with suppress(OSError):  # nobody's home
        yield cache_folder() / (hashlib.sha256(os.fsencode(os.path.abspath(name))).hexdigest()[:24] + INDEX)


def _parse(content: bytes, caption_field: str | None, *, shard: str | None = None) -> ShardIndex | None:
    """The index that a file holds; None if it is none, or of another shard or other captions."""
    try:
        columns = load(content)
        told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        index = ShardIndex(**columns, kind=told["kind"], damage=told["damage"])
        fits = (told["version"], json.loads(told["caption_field"])) == (VERSION, caption_field)
        fits = fits and index.kind in KINDS and told["reasons"] == " ".join(REASONS) and shard in (None, told["shard"])
        return index if fits and _can_be(index) else None
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _can_be(index: ShardIndex) -> bool:
    """Whether the columns of an index are as long as each other, and their values such as can be."""
    offset, length, _, size, reason = columns = index[:5]
    if [column.dtype for column in columns] != list(COLUMNS.values()) or offset.ndim != 1:
        return False
    row = offset.shape
    if [column.shape for column in columns] != [row, row, row, (*row, 2), row]:
        return False
    values = (offset >= 0) & (length >= BLOCK) & (length <= LONGEST) & (reason >= -1) & (reason < len(REASONS))
    apart = offset[1:] >= offset[:-1] + length[:-1]
    return bool(values.all() and apart.all() and (size[reason < 0] > 0).all())


def _fingerprint(url: str) -> str:
    """Of the size and the ends of a local shard: changes when it is written anew, not when it is copied."""
    with open(url, "rb") as file:
        first, size = file.read(4096), file.seek(0, 2)
        file.seek(-min(1 << 14, size), 2)  # tars are filled up with zeros to 10 KiB
        return f"{size} {hashlib.sha256(first + file.read()).hexdigest()[:24]}"


def _scan(path: Path, caption_field: str | None) -> ShardIndex:
    decoder = SampleDecoder(1, caption_field)
    rows: list[tuple[int, int, int, tuple[int, int], int]] = []
    kinds: set[str] = set()

    def visit(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> None:
        first = min(member.offset for member in members.values())
        last = max(member.offset_data - member.size % -BLOCK + member.size for member in members.values())
        raw: Raw = {"__key__": key, "__url__": str(path)}
        for extension, member in members.items():
            raw[extension] = file = open_member(tar, member) if last - first <= LONGEST else LARGE
            if file is not LARGE and extension not in IMAGE_EXTENSIONS:
                raw[extension] = file.read() if extension in READ_WHOLE else b""
        size, reason = (0, 0), -1
        try:
            sample = decoder.open(raw)
            size = sample.size
            kinds.add(KINDS[(sample.moments is not None) + (sample.text is not None)])
        except RejectedError as error:
            reason = REASONS.index(error.reason)
        tar.fileobj.seek(first)
        rows.append((first, min(last - first, LONGEST), crc32(tar.fileobj.read(BLOCK)), size, reason))

    damage = scan_shard(path, visit)
    if len(kinds) > 1:
        raise NothingToReadError(MIXED)
    values = zip(*rows, strict=True) if rows else ([], [], [], np.zeros((0, 2)), [])
    columns = [np.array(column, kind) for column, kind in zip(values, COLUMNS.values(), strict=True)]
    return ShardIndex(*columns, kind=min(kinds, default=KINDS[0]), damage=printable(damage or ""))
