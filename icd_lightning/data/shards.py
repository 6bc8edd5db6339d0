"""Sets of WebDataset shards: write one, find and check the shards of one, describe one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icd_lightning.data.manifest import (
    IMAGE_EXTENSIONS,
    MANIFEST,
    Manifest,
    ShardRecord,
    Verify,
    check_shard,
    index_shard,
    sha256,
)
from icd_lightning.data.sources import check_driver, expand, is_local
from icd_lightning.files import write_whole

logger = logging.getLogger(__name__)

REMEDY = "correct the path, or write shards with `icd data shapes`"

# For PNG, run lengths are the fastest of zlib's strategies on the shapes, and smaller than level 1 of the default one.
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


# --- writing ----------------------------------------------------------------------------------------------------------


def encode_sample(
    key: str, picture: NDArray[np.uint8], caption: str, metadata: dict, *, format: Literal["png", "jpg"] = "png"
) -> dict[str, Any]:
    """Encode a picture (H, W, 3), its caption and metadata as one sample, {"__key__": str, extension: bytes}."""
    if format not in ENCODINGS:
        raise ValueError(f"format {format!r} is not one of {', '.join(ENCODINGS)}")
    stream = BytesIO()
    Image.fromarray(picture).save(stream, **ENCODINGS[format])
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    return {"__key__": key, format: stream.getvalue(), "json": text.encode(), "txt": caption.encode()}


def find_reusable(out: str | Path, parameters: dict[str, Any], *, overwrite: bool = False) -> Manifest | None:
    """Return the manifest if `out` already holds, undamaged, the set made with `parameters`.

    None means that it can be written there: the folder has no shards, or a part or a damaged copy of this very set, or
    anything at all if `overwrite`. Raises ValueError if it holds something else.
    """
    folder = Path(out)
    if overwrite:
        return None
    manifest = Manifest.load(folder)
    if manifest is None:
        if any(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds shards without a {MANIFEST}; choose another folder or pass --overwrite")
        return None
    wanted = json.loads(json.dumps(parameters))
    if manifest.parameters != wanted:
        names = sorted(manifest.parameters.keys() | wanted.keys())
        pairs = [(name, manifest.parameters.get(name), wanted.get(name)) for name in names]
        different = ", ".join(f"{name} {old!r}, not {new!r}" for name, old, new in pairs if old != new)
        raise ValueError(f"{folder} holds another set ({different}); choose another folder or pass --overwrite")
    problems = [] if manifest.complete else [f"{folder} holds an unfinished copy of this set"]
    problems += [p for name, r in manifest.shards.items() if (p := check_shard(folder / name, r, level="bytes"))]
    if problems:
        logger.warning("%s: writing it again", problems[0])
        return None
    return manifest


def write_shards(
    samples: Iterable[dict[str, Any]],
    out: str | Path,
    *,
    shard_size: int,
    parameters: dict[str, Any],
    total: int | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write samples {"__key__": str, extension: bytes, ...} as `out`/00000.tar, 00001.tar, ... and a manifest.

    A folder that holds the set already (see `find_reusable`) is left as it is and no sample is drawn; one that may be
    written loses its old shards. Samples are streamed; equal samples give equal bytes; a shard gets its name only when
    it is whole. `total` serves the progress bar.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size {shard_size} must be at least 1")
    if (existing := find_reusable(out, parameters, overwrite=overwrite)) is not None:
        return existing
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (folder / MANIFEST, *folder.glob("*.tar"), *folder.glob(".*.tmp")):
        stale.unlink(missing_ok=True)
    manifest = Manifest(parameters, complete=False)
    manifest.save(folder)
    remaining = with_progress(samples, f"writing {folder}", total)
    for index in count():
        if (first := next(remaining, None)) is None:
            break
        name = f"{index:05d}.tar"
        record = write_shard(chain([first], islice(remaining, shard_size - 1)), folder / name)
        manifest = replace(manifest, shards={**manifest.shards, name: record})
        manifest.save(folder)
    if not manifest.shards:
        raise ValueError(f"there are no samples to write to {folder}")
    manifest = replace(manifest, complete=True)
    manifest.save(folder)
    return manifest


def write_shard(samples: Iterable[dict[str, Any]], path: Path) -> ShardRecord:
    """Write one shard, which gets its name only when it is whole."""
    records: list[ShardRecord] = []

    def write(temporary: Path) -> None:
        written = 0
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                for extension, data in sample.items():
                    if extension != "__key__":
                        header = tarfile.TarInfo(f"{sample['__key__']}.{extension}")  # mtime 0, no owner: equal bytes
                        header.size = len(data)
                        tar.addfile(header, BytesIO(data))
                written += 1
        records.append(ShardRecord(written, temporary.stat().st_size, sha256(temporary)))

    write_whole(path, write)
    return records[0]


def with_progress(samples: Iterable[dict[str, Any]], label: str, total: int | None) -> Iterator[dict[str, Any]]:
    """Yield the samples and draw a bar on the terminal, if stderr is one."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task, TextColumn

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{task.finished_speed or task.speed or 0:.0f} samples/s"

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed}"), Rate())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(samples, total=total, description=label)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A shard to read; `samples` is None for one that cannot be counted before it is read."""

    url: str
    samples: int | None


def find_shards(urls: str | Sequence[str]) -> list[str]:
    """Expand folders, `{00000..00009}` and `*` to shards, in order; raise FileNotFoundError for missing ones."""
    from webdataset.shardlists import expand_urls  # a second to import

    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        url = os.path.expanduser(url.removeprefix("file://"))
        for name in _in_folder(Path(url)) if os.path.isdir(url) else expand_urls(url):
            check_driver(name)
            if not (matches := expand(name)):
                raise FileNotFoundError(f"no file matches {name}; {REMEDY}")
            found += matches
    if not found:
        raise ValueError(f"urls {urls!r} name no shards; give a folder, a list or a pattern as in shards/{{0..9}}.tar")
    url, times = Counter(found).most_common(1)[0]
    if times > 1:
        raise ValueError(f"urls name {url} {times} times; name each shard once")
    if missing := [url for url in found if is_local(url) and not os.path.isfile(url)]:
        what = "does not exist" if len(missing) == 1 else f"and {len(missing) - 1} more shards do not exist"
        raise FileNotFoundError(f"{missing[0]} {what}; {REMEDY}")
    return found


def _in_folder(folder: Path) -> list[str]:
    manifest = Manifest.load(folder)
    names = {path.name for path in folder.glob("*.tar")} | (manifest.shards.keys() if manifest else set())
    if not names:
        raise FileNotFoundError(f"there are no .tar shards in {folder}; {REMEDY}")
    return [str(folder / name) for name in sorted(names)]


def find_problems(shards: Sequence[str], *, verify: Verify = "count") -> list[str]:
    """Hold shards against the manifests beside them, where there are any; say what is wrong."""
    manifests = {folder: Manifest.load(folder) for folder in {Path(url).parent for url in shards if is_local(url)}}
    problems = [
        f"{folder} holds an unfinished set: let the command that writes it finish"
        for folder, manifest in manifests.items()
        if manifest is not None and not manifest.complete
    ]
    for path in map(Path, shards):
        if (manifest := manifests.get(path.parent)) is not None:
            record = manifest.shards.get(path.name)
            problem = check_shard(path, record, level=verify) if record else f"{path} is not in its folder's {MANIFEST}"
            problems += [problem] if problem else []
    return problems


def open_shards(urls: str | Sequence[str], *, verify: Verify = "count") -> tuple[Shard, ...]:
    """Find, check and count shards; raise ValueError or FileNotFoundError for the first that is not as it should be.

    `verify` compares each local shard with the manifest beside it: "bytes" its size, "count" also its number of samples
    (some 10,000 samples a second), "sha256" also its content. Counts come from the manifest or else from the tar's
    headers; with "off", and for shards that are not local, `samples` is None.
    """
    found = find_shards(urls)
    if verify == "off":
        return tuple(Shard(url, None) for url in found)
    if problems := find_problems(found, verify=verify):
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}; write or copy the shards again, or pass verify=off to read them as is")
    return tuple(Shard(url, _count(Path(url)) if is_local(url) else None) for url in found)


def _count(path: Path) -> int:
    if (manifest := Manifest.load(path.parent)) is not None:
        return manifest.shards[path.name].samples
    entries, problem = index_shard(path)
    if problem:
        logger.warning("%s: %s", path, problem)
    return len(entries)


@dataclass(frozen=True)
class Description:
    """What `describe_shards` found; `sizes` and `captions` are taken from a few samples of every shard."""

    shards: int
    samples: int
    bytes: int
    files: Counter[str]
    sizes: Counter[tuple[int, int]]
    captions: list[str]
    manifest: str
    problems: list[str]


def describe_shards(urls: str | Sequence[str], *, examples: int = 4) -> Description:
    """Count local shards and look into `examples` samples of each, spread evenly; hold them against the manifest."""
    found = find_shards(urls)
    if remote := [url for url in found if not is_local(url)]:
        raise ValueError(f"{remote[0]} is not a local file; copy it to this machine to describe it")
    total, files, sizes, captions = 0, Counter[str](), Counter[tuple[int, int]](), list[str]()
    problems = find_problems(found, verify="sha256")
    for path in found:
        entries, problem = index_shard(path)
        if problem and not any(known.startswith(f"{path} ") for known in problems):  # the manifest tells more
            problems.append(f"{path}: {problem}")
        total += len(entries)
        files.update(extension for entry in entries for extension in entry.files)
        for entry in entries[:: max(1, len(entries) // examples)][:examples]:
            raw = entry.read()
            captions += [raw["txt"].decode("utf-8", errors="replace").strip()] if "txt" in raw else []
            with contextlib.suppress(StopIteration, OSError, SyntaxError):
                data = next(raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw)
                sizes[Image.open(BytesIO(data)).size] += 1
    size = sum(os.path.getsize(path) for path in found)
    bare = [path for path in found if Manifest.load(Path(path).parent) is None]
    manifest = f"none beside {bare[0]}: samples may be missing" if bare else "does not agree" if problems else "agrees"
    return Description(len(found), total, size, files, sizes, captions, manifest, problems)
