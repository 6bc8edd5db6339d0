"""The samples of a tar, grouped in one place for all who count, read or write them.

A sample is the files that share a key and follow each other: `<key>.jpg`, `<key>.txt`, `<key>.json`. As WebDataset has
it, the key ends at the first dot after the last slash, and the extension is the rest, in lower case. Names without an
extension, and those that begin with a dot (macOS writes `._a.jpg` beside `a.jpg`), belong to no sample. A name that
comes again begins another sample of the same key.
"""

from __future__ import annotations

import shlex
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from icd_lightning.data.sources import Readable

Raw = dict[str, Any]  # a sample as webdataset has it: {"__key__": str, "__url__": str, extension: bytes}
T = TypeVar("T")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSIONS = ("txt", "caption")
MOMENTS = "moments.npy"  # holds an encoder's output instead of a picture
TEXT = "text.safetensors"  # beside it, may hold the caption's embeddings
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class UnsortedError(ValueError):
    """The files of a sample do not follow each other."""


@dataclass(frozen=True)
class Entry:
    """Where in a shard the files of one sample lie: extension -> (offset, size) in bytes."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]

    def read(self) -> Raw:
        """Read all files of the sample."""
        raw: Raw = {"__key__": self.key, "__url__": self.shard}
        with open(self.shard, "rb") as file:
            for extension, (offset, size) in self.files.items():
                file.seek(offset)
                raw[extension] = file.read(size)
        return raw


def read_samples(file: Readable, url: str) -> Iterator[Raw]:
    """Read a tar, compressed or not, from end to end."""
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for key, files in _grouped(tar, lambda member: tar.extractfile(member).read()):
            yield {"__key__": key, "__url__": url, **files}


def index_shard(path: str | Path) -> tuple[list[Entry], str | None]:
    """Find every sample of a local tar by its headers alone; also return what is damaged in it, if anything.

    ValueError for a tar that is compressed or not sorted by name.
    """
    _refuse_compressed(Path(path))
    entries: list[Entry] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for key, files in _grouped(tar, lambda member: (member.offset_data, member.size)):
                entries.append(Entry(str(path), key, files))
    except tarfile.TarError as error:
        return entries, f"it is damaged after {len(entries)} samples ({error})"
    except UnsortedError as error:
        raise ValueError(f"{path}: {error}") from error
    with open(path, "rb") as file:
        file.seek(-min(1024, file.seek(0, 2)), 2)
        ended = not any(file.read())  # every whole tar ends with two blocks of zeros
    return entries, None if ended else f"it was cut short after {len(entries)} samples"


def write_tar(samples: Iterable[dict[str, Any]], path: Path) -> int:
    """Write samples {"__key__": str, extension: bytes} and return their number; equal samples give equal bytes."""
    count = 0
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
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
    """The caption in the sample's txt file, or else in its caption file; empty if there is none."""
    texts = (raw.get(extension, b"").decode("utf-8", errors="replace").strip() for extension in CAPTION_EXTENSIONS)
    return next(filter(None, texts), "")


def explain_dots(extensions: Collection[str]) -> str:
    """What to do where pictures are not found since their names have dots; else nothing."""
    dotted = any(extension.endswith(tuple(f".{image}" for image in IMAGE_EXTENSIONS)) for extension in extensions)
    if not dotted or not set(extensions).isdisjoint((*IMAGE_EXTENSIONS, MOMENTS)):
        return ""
    return "a key ends at its first dot: rename the files so that only the extension follows a dot"


def _grouped(tar: tarfile.TarFile, content: Callable[[tarfile.TarInfo], T]) -> Iterator[tuple[str, dict[str, T]]]:
    """Yield (key, {extension: content}) of each sample; UnsortedError where a sample's files lie apart."""
    seen: dict[str, set[str]] = {}
    key, files = "", {}
    for member in tar:
        tar.members = []  # else all are kept
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        member_key, extension = folder + slash + stem, extension.lower()
        if not (member.isreg() and stem and extension):
            continue
        if member_key != key or extension in files:
            if files:
                yield key, files
            key, files = member_key, {}
            if key in seen and extension not in seen[key]:
                raise UnsortedError(
                    f"its files are not sorted by name ({member.name} lies apart from the rest of its sample): sort it "
                    "by `mkdir DIR; tar -xf TAR -C DIR; tar --sort=name -cf TAR -C DIR .`"
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
