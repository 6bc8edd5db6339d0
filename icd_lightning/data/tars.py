"""Shards as files: what a url names is opened here, and a tar's samples are grouped for all who count, read or write.

A url is a local path, `pipe:<command>`, or what fsspec reads (http, s3, gs, hf ...).

A sample is the files that share a key and follow each other: `<key>.jpg`, `<key>.txt`, `<key>.json`. As WebDataset has
it, the key ends at the first dot after the last slash, and the extension is the rest, in lower case. Names without an
extension or with one that begins with `__`, and those that begin with a dot (macOS writes `._a.jpg` beside `a.jpg`),
belong to no sample, nor what Windows writes. A name that comes again begins another sample of the same key.
"""

from __future__ import annotations

import glob
import math
import os
import re
import select
import shlex
import signal
import subprocess
import tarfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import IO, Any, TypeVar
from zlib import crc32

from icd_lightning.trust import check_command

Raw = dict[str, Any]  # a sample as webdataset has it: {"__key__": str, "__url__": str, extension: bytes or LARGE}
T = TypeVar("T")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "caption")
MOMENTS = "moments.npy"  # holds an encoder's output instead of a picture
TEXT = "text.safetensors"  # beside it, may hold the caption's embeddings
INDEX = ".index.safetensors"  # ends the name of the file beside a shard that says where its samples lie
MOST_BYTES = 1 << 28  # of one file of a sample
LARGE = None  # in the place of a larger one
PAUSES = (0.0, 0.5, 2.0)  # seconds before each attempt to read what is elsewhere
OF_WINDOWS = ("thumbs.db", "desktop.ini")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Entry:
    """Where in a shard the files of one sample lie: extension -> (offset, size) in bytes."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]

    def read(self) -> Raw:
        raw: Raw = {"__key__": self.key, "__url__": self.shard}
        with open(self.shard, "rb") as file:
            for extension, (offset, size) in self.files.items():
                file.seek(offset)
                raw[extension] = file.read(size) if size <= MOST_BYTES else LARGE
        return raw


class UnsortedError(ValueError):
    """A sample's files lie apart."""


class OtherLengthError(OSError):
    """A part of a file came in another length: it has been cut, or its server gives out whole files only."""


class BoundedHeader(tarfile.TarInfo):
    """A member's header. Tarfile reads into memory, of any size, what a header of names or attributes says it has."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> BoundedHeader:
        """As of any tar; HeaderError for a header of a megabyte and more."""
        header = super().frombuf(buf, encoding, errors)
        if not (header.isreg() or header.size < 1 << 20):
            raise tarfile.HeaderError(f"a header claims {header.size:,} bytes")
        return header


class _Ending:
    """A file that has an end. Tarfile, told by a header of petabytes, reads on behind it for as long as they take."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.nothing = file, 0

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.nothing = 0 if data else self.nothing + 1
        if self.nothing > 100:
            raise tarfile.ReadError("it ends long before what a header claims")
        return data


def read_samples(file: IO[bytes], url: str) -> Iterator[Raw]:
    """Read a tar, compressed or not, from end to end."""
    with tarfile.open(fileobj=_Ending(file), mode="r|*", tarinfo=BoundedHeader) as tar:
        for key, files in _grouped(tar, url, partial(_content, tar)):
            yield {"__key__": key, "__url__": url, **files}


def parse_sample(part: bytes, url: str, check: int | None = None) -> Raw:
    """The sample of which a part of a tar consists, of this first header's crc32; ReadError for anything else."""
    if check is not None and crc32(part[:512]) != check:
        raise tarfile.ReadError("another header")
    try:
        with tarfile.open(fileobj=BytesIO(part), mode="r:", tarinfo=BoundedHeader) as tar:
            samples = list(_grouped(tar, url, partial(_content, tar)))
    except Exception as error:  # tarfile lets headers that lie raise ValueError, OverflowError, RecursionError ...
        raise tarfile.ReadError(str(error)) from error
    if len(samples) != 1:
        raise tarfile.ReadError(f"{len(samples)} samples in the place of one")
    return {"__key__": samples[0][0], "__url__": url, **samples[0][1]}


def open_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes] | None:
    return tar.extractfile(member) if member.size <= MOST_BYTES else LARGE


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = open_member(tar, member)
    return LARGE if file is None else file.read()


def index_shard(path: str | Path) -> tuple[list[Entry], str | None]:
    """Find every sample of a local tar by its headers alone; also return what is damaged in it, if anything.

    ValueError for a tar that is compressed or not sorted by name.
    """
    entries: list[Entry] = []

    def keep(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> None:
        files = {extension: (member.offset_data, member.size) for extension, member in members.items()}
        entries.append(Entry(str(path), key, files))

    return entries, scan_shard(Path(path), keep)


def scan_shard(path: Path, visit: Callable[[tarfile.TarFile, str, dict[str, tarfile.TarInfo]], None]) -> str | None:
    """Visit (tar, key, members by extension) of each sample of a local tar; return what is damaged, if anything.

    ValueError for a tar that is compressed or not sorted by name.
    """
    _refuse_compressed(path)
    count, visiting = 0, False
    try:
        with tarfile.open(path, "r:", tarinfo=BoundedHeader) as tar:
            for key, members in _grouped(tar, path, lambda member: member):
                visiting = True
                visit(tar, key, members)
                count, visiting = count + 1, False
    except UnsortedError:
        raise
    except Exception as error:  # tarfile lets headers that lie raise ValueError, OverflowError, RecursionError ...
        if visiting:
            raise
        return f"it is damaged after {count} samples ({error})"
    with open(path, "rb") as file:
        file.seek(-min(1024, file.seek(0, 2)), 2)
        ended = not any(file.read())  # every whole tar ends with two blocks of zeros
    return None if ended else f"it was cut short after {count} samples"


def write_tar(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write samples {"__key__": str, extension: bytes} and return their number; equal samples give equal bytes."""
    count = 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            if "." in Path(sample["__key__"]).name:
                raise ValueError(f"key {sample['__key__']} holds a dot, where a key ends: replace it")
            for extension, data in sample.items():
                if not extension.startswith("__"):
                    header = tarfile.TarInfo(f"{sample['__key__']}.{extension}")  # mtime 0 and no owner
                    header.size = len(data)
                    tar.addfile(header, BytesIO(data))
            count += 1
    return count


def text_caption(raw: Raw) -> str:
    """The caption in the sample's txt file, or else in its caption file; empty if there is none.

    ValueError if it is not UTF-8; its byte order mark, which some editors put before it, is no part of it.
    """
    texts = (raw.get(extension, b"").decode("utf-8-sig").strip() for extension in CAPTION_EXTENSIONS)
    return next(filter(None, texts), "")


def gaps(entries: Sequence[Entry]) -> list[str]:
    """What samples of a shard lack, and which keys come twice."""
    if dots := next(filter(None, (explain_dots(entry.files) for entry in entries)), None):
        return [dots]
    wanted = {"picture": {*IMAGE_EXTENSIONS, MOMENTS}, "caption": {*CAPTION_EXTENSIONS, "json"}}
    gaps = []
    for name, extensions in wanted.items():
        if lacking := [entry for entry in entries if not entry.files.keys() & extensions]:
            example = f"{lacking[0].key} has {', '.join(lacking[0].files)}"
            gaps.append(f"{len(lacking)} of {len(entries)} samples have no {name} ({example})")
    key, times = max(Counter(entry.key for entry in entries).items(), key=lambda item: item[1], default=("", 0))
    return gaps + ([f"{key} comes {times} times, each time as a sample of its own"] if times > 1 else [])


def explain_dots(extensions: Collection[str]) -> str:
    """What to do where pictures are not found since their names have dots; else nothing."""
    dotted = any(extension.endswith(tuple(f".{image}" for image in IMAGE_EXTENSIONS)) for extension in extensions)
    if not dotted or not set(extensions).isdisjoint((*IMAGE_EXTENSIONS, MOMENTS)):
        return ""
    return "a key ends at its first dot: rename the files so that only the extension follows a dot"


def _grouped(
    tar: tarfile.TarFile, name: str | Path, content: Callable[[tarfile.TarInfo], T]
) -> Iterator[tuple[str, dict[str, T]]]:
    """Yield (key, {extension: content}) of each sample; ValueError where a sample's files lie apart."""
    seen: dict[str, set[str]] = {}
    key, files = "", {}
    for member in tar:
        tar.members = []  # else all are kept
        folder, slash, file = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = file.partition(".")
        member_key, extension = folder + slash + stem, extension.lower()
        if not (member.isreg() and stem and extension) or extension.startswith("__") or member.issparse():
            continue
        if file.lower() in OF_WINDOWS:
            continue
        if member.size < 0:
            raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
        if member_key != key or extension in files:
            if files:
                yield key, files
            key, files = member_key, {}
            if key in seen and extension not in seen[key]:
                raise UnsortedError(
                    f"{name}: its files are not sorted by name ({member.name} lies apart from the rest of its sample): "
                    "sort it by `mkdir DIR; tar -xf TAR -C DIR; tar --sort=name -cf TAR -C DIR .`"
                )
        files[extension] = content(member)
        seen.setdefault(key, set()).add(extension)
    if files:
        yield key, files


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    if tool := next((tool for magic, tool in COMPRESSIONS.items() if start.startswith(magic)), None):
        plain = path.with_name(path.name.partition(".")[0] + ".tar")
        packed, new, target = (shlex.quote(str(name)) for name in (path, f"{plain}.new", plain))
        raise ValueError(
            f"{path} is compressed, and its samples cannot be found by place: unpack it by "
            f"`{tool} -dc < {packed} > {new} && mv {new} {target}`"
        )


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine, not `http://...`, `pipe:...` or the like."""
    return re.match(r"[a-z0-9]+:", url) is None


def open_url(url: str, *, patience: float = 60.0) -> IO[bytes]:
    """Open a shard for reading; remote ones fail with an OSError where nothing comes for `patience` seconds."""
    if is_local(url):
        return open(url, "rb")
    if url.startswith("pipe:"):
        return _Pipe(url.removeprefix("pipe:"), patience)
    system, path = _store(url, patience)
    return system.open(path, "rb")


def read_ranges(
    places: Sequence[tuple[str, int, int]], *, patience: float = 60.0, given_up: Collection[str] = ()
) -> list[bytes | Exception]:
    """Read (url, offset, length) each, those of a store side by side; an error in the place of what cannot be read.

    What is elsewhere is tried again, but for urls that are given up and for what comes in another length.
    """
    parts = _read_once(places, patience)
    for pause in PAUSES[1:]:
        if not (again := [n for n, part in enumerate(parts) if _may_come(places[n][0], part, given_up)]):
            break
        time.sleep(pause)
        for n, part in zip(again, _read_once([places[n] for n in again], patience), strict=True):
            parts[n] = part
    return parts


def _may_come(url: str, part: bytes | Exception, given_up: Collection[str]) -> bool:
    failed = isinstance(part, Exception) and not isinstance(part, OtherLengthError)
    return failed and not is_local(url) and url not in given_up


def _read_once(places: Sequence[tuple[str, int, int]], patience: float) -> list[bytes | Exception]:
    parts: list[bytes | Exception] = [b""] * len(places)
    stores: defaultdict[Any, list[tuple[int, str]]] = defaultdict(list)
    for index, (url, offset, length) in enumerate(places):
        if not is_local(url):
            store, path = _store(url, patience)
            stores[store].append((index, path))
            continue
        try:
            with open(url, "rb") as file:
                file.seek(offset)
                parts[index] = file.read(length)
        except OSError as error:
            parts[index] = error
    for store, wanted in stores.items():
        starts = [places[index][1] for index, _ in wanted]
        ends = [sum(places[index][1:]) for index, _ in wanted]
        answers = store.cat_ranges([path for _, path in wanted], starts, ends, on_error="return")
        for (index, _), answer in zip(wanted, answers, strict=True):
            parts[index] = answer
    for index, (url, _, length) in enumerate(places):
        if isinstance(part := parts[index], bytes) and len(part) != length:
            parts[index] = OtherLengthError(f"{url} gave {len(part)} bytes in the place of {length}")
    return parts


def read_small(url: str, most: int, *, patience: float = 60.0) -> bytes | None:
    """What a file elsewhere holds; None if it is not there, or not for us; OSError if it cannot be read."""
    store, path = _store(url, patience)
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with store.open(path, "rb") as file:
                content = file.read(most + 1)
            return content if len(content) <= most else None
        except Exception as error:  # each store has errors of its own
            cause = error.__cause__ or error  # fsspec calls whatever fails on http a FileNotFoundError
            status = getattr(cause, "status", None)
            if status in (401, 403, 404, 410) or (
                status is None and isinstance(error, FileNotFoundError | PermissionError)
            ):
                return None
            problem = cause
    raise OSError(f"{url} cannot be read ({type(problem).__name__}: {problem})")


def _store(url: str, patience: float) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options = {}  # the drivers of stores have timeouts and retries of their own
    if url.startswith(("http:", "https:")):
        from aiohttp import ClientTimeout

        # aiohttp's own limit is five minutes for the whole of an answer, and a shard may well be read for longer
        limit = None if math.isinf(patience) else patience
        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=limit, sock_read=limit)}
    return url_to_fs(url, **options)


def expand(url: str) -> list[str]:
    """Replace `*` by what is there, in order; [url] where there is none, as in a command.

    ValueError if no installed package reads urls of this kind, naming the one that would.
    """
    if is_local(url):
        return sorted(map(os.path.abspath, glob.glob(url))) if "*" in url else [url]
    if url.startswith("pipe:"):
        check_command(url)
        return [url]
    from fsspec import get_filesystem_class
    from fsspec.core import url_to_fs

    try:
        get_filesystem_class(url.partition(":")[0])
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be read here: {error}; or copy it to this machine") from error
    if "*" not in url:
        return [url]
    system, pattern = url_to_fs(url)
    return sorted(system.unstrip_protocol(path) for path in system.glob(pattern))


class _Pipe(RawIOBase):
    """What a shell command writes, as a file. A silence or an exit code is an error, and closing ends the command."""

    def __init__(self, command: str, patience: float) -> None:
        self.patience = patience
        self.process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        assert self.process.stdout is not None
        self.output = self.process.stdout
        self.poll = select.poll()
        self.poll.register(self.output, select.POLLIN)

    def read(self, size: int = -1, /) -> bytes:
        if not self.poll.poll(None if math.isinf(self.patience) else self.patience * 1000):
            raise TimeoutError(f"the command gave nothing for {self.patience:g} s")
        data = self.output.read(size)
        if not data and (code := self.process.wait()):
            raise OSError(f"the command ended with exit code {code}")
        return data

    def close(self) -> None:
        self.output.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # what the shell has started, too
        self.process.wait()
        super().close()
