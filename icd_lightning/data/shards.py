"""Sets of WebDataset shards: write one, find and check the shards of one, describe one."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from icd_lightning.data.images import FORMATS
from icd_lightning.data.manifest import MANIFEST, Manifest, ShardRecord, Verify, check_shard, remove_shards, write_shard
from icd_lightning.data.tars import IMAGE_EXTENSIONS, INDEX, Raw, expand, gaps, index_shard, is_local, text_caption
from icd_lightning.progress import progress

logger = logging.getLogger(__name__)

MOST_SHARDS = 1_000_000  # named by one pattern
REMEDY = "correct the path, or write shards with `icd data shapes`"

# For PNG, run lengths are the fastest of zlib's strategies on the shapes, and smaller than level 1 of the default one.
ENCODINGS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 1, "compress_type": 3},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def encode_sample(
    key: str, picture: NDArray[np.uint8], caption: str, metadata: dict, *, format: Literal["png", "jpg"] = "png"
) -> dict[str, Any]:
    """Encode a picture (H, W, 3), its caption and metadata as one sample, {"__key__": str, extension: bytes}."""
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
    if overwrite or (manifest := Manifest.of_set(folder, parameters)) is None:
        return None
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
    remove_shards(folder)
    records: dict[str, ShardRecord] = {}
    Manifest(parameters, records, complete=False).save(folder)
    remaining = progress(samples, f"writing {folder}", total)
    while (first := next(remaining, None)) is not None:
        name = f"{len(records):05d}.tar"
        records[name] = write_shard(chain([first], islice(remaining, shard_size - 1)), folder / name)
        Manifest(parameters, records, complete=False).save(folder)
    if not records:
        raise ValueError(f"there are no samples to write to {folder}")
    manifest = Manifest(parameters, records)
    manifest.save(folder)
    return manifest


@dataclass(frozen=True)
class Shard:
    """A shard to read; `samples` is None for one that cannot be counted before it is read, `damage` what is wrong."""

    url: str
    samples: int | None
    damage: str | None = None
    sha256: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def find_shards(urls: str | Sequence[str]) -> list[str]:
    """Expand folders, `{00000..00009}` and `*` to shards, in order; raise FileNotFoundError for missing ones."""
    from webdataset.shardlists import expand_urls  # a second to import

    shards: list[str] = []
    for url in filter(None, [urls] if isinstance(urls, str) else urls):
        url = os.path.expanduser(url.removeprefix("file://"))
        if os.path.isdir(url):
            shards += _in_folder(Path(url))
            continue
        if _names(url) > MOST_SHARDS:
            raise ValueError(f"urls {url[:200]!r} stand for more than {MOST_SHARDS:,} shards: give a smaller pattern")
        for name in expand_urls(url):
            if not (matches := [match for match in expand(name) if not match.endswith(INDEX)]):
                raise FileNotFoundError(f"no file matches {name}; {REMEDY}")
            shards += matches
    if not shards:
        raise ValueError(f"urls {urls!r} name no shards; give a folder, a list or a pattern as in shards/{{0..9}}.tar")
    url, times = Counter(shards).most_common(1)[0]
    if times > 1:
        raise ValueError(f"urls name {url} {times} times; name each shard once")
    if missing := [url for url in shards if is_local(url) and not os.path.isfile(url)]:
        gone = ("does not exist", "do not exist") if not os.path.exists(missing[0]) else ("is no file", "are no files")
        what = gone[0] if len(missing) == 1 else f"and {len(missing) - 1} more shards {gone[1]}"
        raise FileNotFoundError(f"{missing[0]} {what}; {REMEDY}")
    return shards


def _names(pattern: str) -> int:
    """For how many names the braces of a pattern stand, at most; to write all of them out may take for ever."""
    count = 1
    while braces := re.search(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(-?\d+)\.\.(-?\d+).*", braces[1])
        count *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else braces[1].count(",") + 1
        pattern = f"{pattern[: braces.start()]}_{pattern[braces.end() :]}"
        if count > MOST_SHARDS:
            break
    return count


def _in_folder(folder: Path) -> list[str]:
    manifest = Manifest.load(folder)
    names = {path.name for path in folder.glob("*.tar")} | (manifest.shards.keys() if manifest else set())
    names = names or {path.name for path in folder.glob("*.tar.*") if not path.name.endswith(INDEX)}  # compressed
    if not names:
        raise FileNotFoundError(f"there are no .tar shards in {folder}; {REMEDY}")
    # a name is no url, whatever it looks like: an absolute path is read as one
    return [os.path.abspath(folder / name) for name in sorted(names)]


def _compare(shards: Sequence[str], manifests: Mapping[Path, Manifest], *, verify: Verify) -> list[str]:
    problems = [
        f"{folder} holds an unfinished set: let the command that writes it finish"
        for folder, manifest in manifests.items()
        if not manifest.complete
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
    (some 10,000 samples a second, once), "sha256" also its content. Counts come from the manifest, the shard's index or
    the tar's headers; with "off", and for shards that are not local, `samples` is None.
    """
    from icd_lightning.data.index import count_samples  # with torch, a second to import

    shards = find_shards(urls)
    if verify == "off":
        return tuple(Shard(url, None) for url in shards)
    manifests = Manifest.beside(shards)
    if problems := _compare(shards, manifests, verify=verify):
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(
            f"{problems[0]}{more}; write or copy the shards again, or "
            "give verify=off and batches_per_epoch to read them as they are"
        )
    found: dict[str, Shard] = {}
    for url, path in ((url, Path(url)) for url in shards if is_local(url)):
        if path.parent in manifests:
            record = manifests[path.parent].shards[path.name]
            found[url] = Shard(url, record.samples, sha256=record.sha256)
            continue
        found[url] = Shard(url, *count_samples(path))
        if damage := found[url].damage:
            logger.warning("%s: %s", path, damage)
    return tuple(found.get(url, Shard(url, None)) for url in shards)


def describe_shards(urls: str | Sequence[str], *, examples: int = 4) -> tuple[list[tuple[str, str]], list[str]]:
    """What local shards hold, as rows (name, text), and all that is wrong; `examples` of each are looked into."""
    paths = find_shards(urls)
    if remote := [url for url in paths if not is_local(url)]:
        raise ValueError(f"{remote[0]} is not a local file; copy it to this machine to describe it")
    samples, files, sizes, captions = 0, Counter[str](), Counter[str](), list[str]()
    manifests = Manifest.beside(paths)
    problems = _compare(paths, manifests, verify="sha256")
    bare = [path for path in paths if Path(path).parent not in manifests]
    manifest = "does not agree" if problems else "agrees"
    for path in paths:
        entries, damage = index_shard(path)
        if not any(known.startswith(f"{path} ") for known in problems):  # the manifest tells more
            problems += [f"{path}: {problem}" for problem in ([damage] if damage else gaps(entries))]
        samples += len(entries)
        files.update(extension for entry in entries for extension in entry.files)
        for entry in entries[:: max(1, len(entries) // examples)][:examples]:
            raw = entry.read()
            with contextlib.suppress(ValueError, AttributeError):  # the second of one that is too large
                captions += [caption] if (caption := text_caption(raw)) else []
            problems += _unusable(raw)
            with contextlib.suppress(Exception):  # Pillow has many for bad files
                data = next(raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw)
                sizes["{} x {}".format(*Image.open(BytesIO(data), formats=FORMATS).size)] += 1
    rows = [
        ("shards", f"{len(paths)}"),
        ("samples", f"{samples}"),
        ("bytes", f"{sum(os.path.getsize(path) for path in paths):,}"),
        ("files", ", ".join(f"{number} {extension}" for extension, number in files.most_common(20))),
        ("sizes", ", ".join(size for size, _ in sizes.most_common(5)) or "no pictures"),
        *(("caption", caption) for caption in captions[:examples]),
        ("manifest", f"none beside {bare[0]}: samples may be missing" if bare else manifest),
    ]
    return rows, problems


def _unusable(raw: Raw) -> list[str]:
    """Why a sample cannot be used, whatever is asked of it; of what it lacks, `gaps` tells."""
    from icd_lightning.data.decoding import SampleDecoder  # with torch, a second to import
    from icd_lightning.data.tally import RejectedError

    decoder = SampleDecoder(1, min_size=0)
    try:
        decoder.finish(decoder.open(raw))
    except RejectedError as error:
        return [str(error)] if error.reason not in ("no_image", "no_caption") else []
    return []
