"""The manifest beside shards, which says what each must hold.

A tar that was cut between two samples still reads without error; `manifest.json`, with each shard's samples, bytes and
sha256, is the guard against that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from icd_lightning.data.remote import AnyPath
from icd_lightning.data.tars import INDEX, is_local, write_tar
from icd_lightning.files import read_object, remove_tree, write_json, write_text, write_whole

MANIFEST = "manifest.json"
PROGRESS = ".progress"  # holds a record of each shard that is done, where several processes write a set
Verify = Literal["off", "bytes", "count", "sha256"]


@dataclass(frozen=True)
class ShardRecord:
    """What one shard must hold; `source` is the sha256 of the shard that it was made from, where that is known."""

    samples: int
    bytes: int
    sha256: str
    source: str = ""

    def __post_init__(self) -> None:
        counts = (self.samples, self.bytes)
        texts = all(isinstance(text, str) for text in (self.sha256, self.source))
        if not all(type(count) is int and count >= 0 for count in counts) or not texts:
            raise ValueError(f"{self} is no record of a shard")
        if self.samples * 512 > self.bytes:  # a tar needs as many for the header of one file
            raise ValueError(f"{self.samples} samples do not fit in {self.bytes} bytes")

    def fields(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value != ""}


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
    def load(cls, folder: AnyPath) -> Manifest | None:
        """Read `folder`/manifest.json; None if there is none."""
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            content = read_object(path)
            shards = {name: ShardRecord(**record) for name, record in content["shards"].items()}
            if wrong := [name for name in shards if name != Path(name).name or not name.endswith(".tar")]:
                raise ValueError(f"{wrong[0]!r} is no name of a shard in this folder")
            if not (isinstance(content["parameters"], dict) and isinstance(content["complete"], bool)):
                raise ValueError("parameters must be an object, and complete true or false")
            return cls(content["parameters"], shards, content["complete"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error!r}); remove it or write the shards again") from error

    @classmethod
    def beside(cls, shards: Iterable[str]) -> dict[Path, Manifest]:
        """By folder, the manifests that lie beside local shards."""
        folders = dict.fromkeys(Path(url).parent for url in shards if is_local(url))
        return {folder: manifest for folder in folders if (manifest := cls.load(folder))}

    @classmethod
    def of_set(cls, folder: AnyPath, parameters: dict[str, Any], *, partly: bool = False) -> Manifest | None:
        """The manifest of the set made with `parameters`; None where no shards are, ValueError for another set.

        `partly` allows for what else it says of its making.
        """
        holds_shards = any(folder.glob("*.tar"))  # before the manifest, which is written before the first shard
        manifest = cls.load(folder)
        if manifest is None:
            if holds_shards:
                raise ValueError(
                    f"{folder} holds shards without a {MANIFEST}; choose another folder or pass --overwrite"
                )
            return None
        wanted, there = json.loads(json.dumps(parameters)), manifest.parameters
        pairs = [
            (name, there.get(name), wanted.get(name))
            for name in sorted(wanted if partly else there.keys() | wanted.keys())
        ]
        if changes := ", ".join(f"{name} {old!r}, not {new!r}" for name, old, new in pairs if old != new):
            raise ValueError(f"{folder} holds another set ({changes}); choose another folder or pass --overwrite")
        return manifest

    def save(self, folder: AnyPath) -> None:
        shards = {name: record.fields() for name, record in self.shards.items()}
        write_text(folder / MANIFEST, json.dumps({**vars(self), "shards": shards}, indent=1) + "\n")


def remove_shards(folder: AnyPath) -> None:
    """Remove shards, their manifest and what interrupted writers left."""
    remove_tree(folder / PROGRESS)
    for stale in (folder / MANIFEST, *folder.glob("*.tar"), *folder.glob(f"*{INDEX}"), *folder.glob(".*.tmp")):
        stale.unlink(missing_ok=True)


def write_shard(samples: Iterable[dict[str, Any]], path: AnyPath) -> ShardRecord:

    def write(temporary: Path) -> ShardRecord:
        count = write_tar(samples, temporary)
        return ShardRecord(count, temporary.stat().st_size, sha256(temporary))

    return write_whole(path, write)


def write_recorded(samples: Iterable[dict[str, Any]], folder: AnyPath, name: str, *, source: str = "") -> None:
    """Write one shard of a set that several processes write, and then its record; nothing if another was faster."""
    try:
        record = replace(write_shard(samples, folder / name), source=source)
    except FileNotFoundError:  # whoever completed the set removed what was half written
        if name not in finished_shards(folder):
            raise
        return
    write_json(folder / PROGRESS / f"{name}.json", record.fields())


def finished_shards(folder: AnyPath) -> dict[str, ShardRecord]:
    records = {}
    for file in (folder / PROGRESS).glob("*.json"):
        with suppress(FileNotFoundError):  # another process has just completed the set
            try:
                records[file.name.removesuffix(".json")] = ShardRecord(**read_object(file))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is no record of a shard ({error}): remove it, and call again") from error
    manifest = Manifest.load(folder)  # after those, which are removed once it has them all
    return (manifest.shards if manifest else {}) | records


def complete_set(folder: AnyPath, parameters: dict[str, Any], names: list[str]) -> Manifest:
    """The manifest as it is now; complete, on disk too, if every shard is done."""
    records = finished_shards(folder)
    own = {name: records.pop(name) for name in names if name in records}
    manifest = Manifest(parameters, own | records, complete=len(own) == len(names))
    if manifest.complete:
        if manifest != Manifest.load(folder):
            manifest.save(folder)
        remove_tree(folder / PROGRESS)
        for stale in folder.glob(".*.tar-*.tmp"):  # another process may be writing the manifest
            stale.unlink(missing_ok=True)
    return manifest


def check_shard(path: Path, record: ShardRecord, *, level: Verify) -> str | None:
    """Compare a local shard with its record, up to `level`; say what is wrong with it, if anything."""
    if not path.exists():
        return f"{path} is missing ({MANIFEST} says {record.samples} samples)"
    size = path.stat().st_size
    if size != record.bytes or level != "bytes":
        from icd_lightning.data.index import count_samples  # with torch, a second to import

        samples = count_samples(path)[0]
        if size != record.bytes or samples != record.samples:
            wanted = f"{record.samples} in {record.bytes}"
            return f"{path} holds {samples} samples in {size} bytes, but {MANIFEST} says {wanted}"
    if level == "sha256" and sha256(path) != record.sha256:
        return f"{path} has another sha256 than {MANIFEST} says"
    return None


def hexdigest(kind: str, *paths: Path) -> str:
    """Over the contents of files, one after another."""
    digest = hashlib.new(kind, usedforsecurity=False)
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


sha256 = partial(hexdigest, "sha256")
