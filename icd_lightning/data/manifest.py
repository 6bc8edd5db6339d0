"""What a shard holds: its samples one by one, and the manifest that says how many there must be.

A shard is a tar in which the files of a sample, `<key>.png`, `<key>.txt`, `<key>.json`, follow each other. Cut between
two samples it still reads without error; `manifest.json` beside the shards, with each one's samples, bytes and sha256,
is the guard against that.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from icd_lightning.files import write_whole

MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
Verify = Literal["off", "bytes", "count", "sha256"]


@dataclass(frozen=True)
class ShardRecord:
    """What one shard must hold."""

    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards must hold, and the parameters it was made with."""

    parameters: dict[str, Any]
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    complete: bool = True

    @property
    def samples(self) -> int:
        return sum(record.samples for record in self.shards.values())

    @classmethod
    def load(cls, folder: Path) -> Manifest | None:
        """Read `folder`/manifest.json; None if there is none."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            shards = {name: ShardRecord(**record) for name, record in content["shards"].items()}
            return cls(content["parameters"], shards, content["complete"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); remove it or write the shards again") from error

    def save(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1) + "\n"
        write_whole(folder / MANIFEST, lambda temporary: temporary.write_text(text))


@dataclass(frozen=True)
class Entry:
    """Where in a shard the files of one sample lie: extension -> (offset, size) in bytes."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]

    def read(self) -> dict[str, Any]:
        """Return the sample as webdataset does: {"__key__", "__url__", extension: bytes, ...}."""
        raw: dict[str, Any] = {"__key__": self.key, "__url__": self.shard}
        with open(self.shard, "rb") as file:
            for extension, (offset, size) in self.files.items():
                file.seek(offset)
                raw[extension] = file.read(size)
        return raw


def index_shard(path: str | Path) -> tuple[list[Entry], str | None]:
    """Find every sample of a local, uncompressed tar by its headers alone; also return what is wrong with it, if so."""
    entries: list[Entry] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                hidden = member.name.startswith("__") and "__" in member.name[2:]  # webdataset's own notes
                if not member.isreg() or not dot or not stem or hidden:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if not entries or entries[-1].key != key:
                    entries.append(Entry(str(path), key, {}))
                entries[-1].files[extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        return entries, f"it is damaged after {len(entries)} samples ({error})"
    with open(path, "rb") as file:
        file.seek(-min(1024, file.seek(0, 2)), 2)
        ended = not any(file.read())  # every whole tar ends with two blocks of zeros
    return entries, None if ended else f"it was cut short after {len(entries)} samples"


def check_shard(path: Path, record: ShardRecord, *, level: Verify) -> str | None:
    """Compare a local shard with its record, up to `level`; say what is wrong with it, if anything."""
    if level == "off":
        return None
    if not path.exists():
        return f"{path} is missing ({MANIFEST} says {record.samples} samples)"
    size = path.stat().st_size
    if size != record.bytes or level != "bytes":
        samples = len(index_shard(path)[0])
        if size != record.bytes or samples != record.samples:
            wanted = f"{record.samples} in {record.bytes}"
            return f"{path} holds {samples} samples in {size} bytes, but {MANIFEST} says {wanted}"
    if level == "sha256" and sha256(path) != record.sha256:
        return f"{path} has another sha256 than {MANIFEST} says"
    return None


def sha256(*paths: Path) -> str:
    """SHA-256 over the contents of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
