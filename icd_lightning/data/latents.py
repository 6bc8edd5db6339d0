"""Latents on disk: shards of pictures become shards of what the autoencoder's encoder made of them.

Training then needs no encoder. Kept are the posterior's mean and log-variance, not one sample of it, so that every
epoch draws fresh latents; and, if asked for, what text encoders make of the captions.

A shard is a piece of curation's engine. Several processes may share them: each leaves a record of every shard that it
has finished, and whoever finds them all there writes the complete manifest.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from icd_lightning.data.curation.engine import Engine
from icd_lightning.data.decoding import Sample, SampleDecoder, require
from icd_lightning.data.images import to_images
from icd_lightning.data.manifest import Manifest, complete_set, finished_shards, remove_shards, write_recorded
from icd_lightning.data.remote import AnyPath, folder_at
from icd_lightning.data.shards import Shard, open_shards
from icd_lightning.data.tally import RejectedError, Tally, left_out
from icd_lightning.data.tars import MOMENTS, TEXT, Raw, is_local
from icd_lightning.data.uncounted import read_shard
from icd_lightning.progress import progress

logger = logging.getLogger(__name__)

HERE = Engine(num_workers=0)
PATIENCE = 60.0  # seconds without a sample that can be used, after which a source is given up
Picture = tuple[Sample, torch.Tensor]  # a sample, and its image (3, H, W) in [-1, 1]


@dataclass(frozen=True)
class Encoders:
    """What is cached, and the fingerprints of what makes it.

    moments(images (B, 3, H, W) in [-1, 1]) gives those of the autoencoder, embeds(B captions) embeddings by name.
    """

    autoencoder: str
    moments: Callable[[torch.Tensor], torch.Tensor]
    text_encoder: str | None = None
    embeds: Callable[[list[str]], dict[str, torch.Tensor]] | None = None


@dataclass(frozen=True)
class Caching:
    """Writes the latents of shards. `num_workers` threads decode meanwhile; with 0 one thing is done after another.

    With `allow_broken` a shard that cannot be read to its end gets the latents of what could be read, else none.
    """

    encoders: Encoders
    decoder: SampleDecoder
    batch_size: int = 32
    num_workers: int = 4
    allow_broken: bool = False

    def __post_init__(self) -> None:
        require(batch_size=self.batch_size, at_least=1)
        require(num_workers=self.num_workers, at_least=0)

    @property
    def settings(self) -> dict[str, Any]:
        """How latents and embeddings were made, as each sample says it."""
        made = {"resolution": self.decoder.resolution, "autoencoder": self.encoders.autoencoder}
        made |= {"buckets": True} if self.decoder.buckets else {}
        return made | ({"text_encoder": self.encoders.text_encoder} if self.encoders.embeds else {})

    @property
    def parameters(self) -> dict[str, Any]:
        about = {"caption_field": self.decoder.caption_field, "min_size": self.decoder.min_size}
        return {"latents": self.settings, **about}

    def write(self, folder: AnyPath, shard: Shard) -> tuple[str, list[tuple[str, str, int]]]:
        """Write the latents of a shard; returns its url, and why samples were left out: reason, an example, count."""
        tally = Tally(stall_timeout=PATIENCE, quiet=True)
        with suppress(RejectedError):
            write_recorded(self._files(shard, tally), folder, shard.name, source=shard.sha256)
        counts = tally.counts()
        return shard.url, [(reason, detail, counts[reason]) for reason, detail in tally.details.items()]

    def _files(self, shard: Shard, tally: Tally) -> Iterator[dict[str, Any]]:
        """Yield {"__key__": str, MOMENTS, perhaps TEXT, "json", "txt": bytes} for each sample that can be used.

        RejectedError at the end of a broken shard of which nothing shall be kept.
        """
        with closing(read_shard(shard.url, tally)) as raws, closing(self._ahead(raws)) as futures:
            decoded = tally.usable(Future.result, futures)
            while batch := list(islice(decoded, self.batch_size)):
                yield from self._encoded(batch)
                tally.awaited()  # the time that the encoder took is no silence of the source
        if shard.damage and not tally.counts()["broken_shard"]:  # cut between samples: reading sees nothing of it
            tally.broke(f"{shard.url}: {shard.damage}")
        if tally.counts()["broken_shard"] and not self.allow_broken:
            raise RejectedError("broken_shard", shard.url)

    def _ahead(self, raws: Iterable[Raw]) -> Generator[Future[Picture], None, None]:
        """Yield in order a future of each picture; those of another batch, and two a thread, are under way."""
        pool, waiting = ThreadPoolExecutor(max(1, self.num_workers)), deque[Future[Picture]]()
        most = self.batch_size + 2 * self.num_workers if self.num_workers else 0
        try:
            for raw in raws:
                waiting.append(pool.submit(self._decoded, raw))
                if len(waiting) > most:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)

    def _decoded(self, raw: Raw) -> Picture:
        sample = self.decoder.decode(raw)
        if sample.picture is None:
            raise ValueError(f"{raw['__url__']} holds latents already: name shards of pictures")
        return sample._replace(picture=None), to_images([sample.picture])[0]

    def _encoded(self, batch: Sequence[Picture]) -> Iterator[dict[str, Any]]:
        """The files of samples, of which those of one size are encoded together."""
        by_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for row, (sample, _) in enumerate(batch):
            by_size[sample.size].append(row)
        moments: dict[int, NDArray[np.float16]] = {}
        for rows in by_size.values():
            made = self.encoders.moments(torch.stack([batch[row][1] for row in rows]))
            moments |= zip(rows, _half(made, "the autoencoder gives latents", batch[rows[0]][0]), strict=True)
        texts = self._texts([sample for sample, _ in batch])
        for row, (sample, _) in enumerate(batch):
            stream = BytesIO()
            np.save(stream, moments[row])
            files = {MOMENTS: stream.getvalue()} | ({TEXT: save(texts[row])} if texts else {})
            about = json.dumps(sample.metadata | {"moments": self.settings}, sort_keys=True, separators=(",", ":"))
            yield {"__key__": sample.key, **files, "json": about.encode(), "txt": sample.caption.encode()}

    def _texts(self, samples: Sequence[Sample]) -> list[dict[str, NDArray[np.float16]]]:
        if self.encoders.embeds is None:
            return []
        encoded = self.encoders.embeds([sample.caption for sample in samples])
        source = "the text encoder gives embeddings"
        embeds = {name: _half(values, source, samples[0]) for name, values in encoded.items()}
        return [{name: values[row] for name, values in embeds.items()} for row in range(len(samples))]


def cache_latents(
    urls: str | Sequence[str],
    out: str | Path,
    caching: Caching,
    *,
    part: tuple[int, int] = (0, 1),
    engine: Engine = HERE,
    overwrite: bool = False,
) -> Manifest:
    """Write shard for shard the moments of pictures to `out`, each under its name; go on where an earlier call stopped.

    Pictures that cannot be used are left out and counted. `part` (i, n) does every n-th shard from the i-th on; the
    manifest returned is complete once every shard is done, by whomever. The bytes do not depend on who does the work.

    Raises ValueError if `out`, a folder or the url of one in a store, holds anything else than latents made so, or of
    shards that have changed since; and, once the others are done, for shards that could not be read to their end.
    """
    folder, shards = folder_at(out), _by_name(open_shards(urls))
    if any(_lies_in(folder, shard.url) for shard in shards.values()):
        raise ValueError(f"{folder} holds the pictures themselves: choose another folder for their latents")
    if overwrite and part[1] > 1:
        raise ValueError(f"to overwrite would remove what other parts write: remove {folder} before you start them")
    missing = list(shards.values()) if overwrite else _missing(folder, caching.parameters, shards, part)
    broken = []
    if missing:
        with engine.started() as each:
            if overwrite:  # not before it is known that there is an engine
                remove_shards(folder)
            _begin(folder, caching.parameters)
            broken = _written(
                progress(each(partial(caching.write, folder), missing), f"encoding to {folder}", len(missing))
            )
    manifest = complete_set(folder, caching.parameters, list(shards))
    if broken:
        _report(folder, broken, allowed=caching.allow_broken)
    return manifest


def _written(outcomes: Iterable[tuple[str, list[tuple[str, str, int]]]]) -> list[str]:
    """Tell what was left out of shards as they are done; returns which of them were broken."""
    tally, broken = Tally(), []
    for url, skipped in outcomes:
        for reason, detail, count in skipped:
            tally.skipped(reason, detail, count)
            broken += [url] if reason == "broken_shard" else []
    if skipped_in_all := left_out(tally.counts()):
        logger.warning("left out: %s", skipped_in_all)
    return sorted(broken)


def _report(folder: AnyPath, broken: Sequence[str], *, allowed: bool) -> None:
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    which = f"shards that cannot be read to their end ({', '.join(broken[:5])}{more})"
    if not allowed:
        raise ValueError(
            f"{folder} lacks the latents of {which}: write or copy these again and run the same command, or "
            "pass --allow_broken to do without what they have lost"
        )
    logger.warning("%s holds what could be read of %s", folder, which)


def _half(values: torch.Tensor, source: str, near: Sample) -> NDArray[np.float16]:
    """In float16, as they are kept; ValueError for what is not finite in it."""
    half = values.to("cpu", torch.float16).numpy()
    if not np.isfinite(half).all():
        what = "too large for float16, in which they are kept" if values.isfinite().all() else "not finite"
        raise ValueError(f"{source} that are {what}, near {near.key}: take another encoder, or train without caching")
    return half


def _lies_in(folder: AnyPath, url: str) -> bool:
    if isinstance(folder, Path):
        return is_local(url) and Path(url).resolve().parent == folder.resolve()
    if is_local(url) or url.startswith("pipe:"):
        return False
    other = folder_at(url.rpartition("/")[0])  # one folder may have several urls, such as gs:// and gcs://
    return (other.system, other.path) == (folder.system, folder.path)


def _by_name(shards: Sequence[Shard]) -> dict[str, Shard]:
    named: dict[str, Shard] = {}
    for shard in shards:
        if not shard.name.endswith(".tar"):
            raise ValueError(f"{shard.url} must end with the name of a .tar: its latents get the same name")
        if shard.name in named:
            raise ValueError(f"two shards are named {shard.name}: cache their latents to different folders")
        named[shard.name] = shard
    return named


def _missing(
    folder: AnyPath, parameters: dict[str, Any], shards: Mapping[str, Shard], part: tuple[int, int]
) -> list[Shard]:
    """Which shards of a part are still to be written."""
    Manifest.of_set(folder, parameters, partly=True)
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.tar")}
    done = {name: record for name, record in finished_shards(folder).items() if sizes.get(name) == record.bytes}
    for name in filter(done.__contains__, shards):
        if len({done[name].source, shards[name].sha256} - {""}) > 1:
            raise ValueError(
                f"{shards[name].url} has changed since its latents were made: choose another folder or pass --overwrite"
            )
    return [shards[name] for name in list(shards)[part[0] :: part[1]] if name not in done]


def _begin(folder: AnyPath, parameters: dict[str, Any]) -> None:
    there = Manifest.load(folder)
    if there is None or there.complete:
        replace(there or Manifest(parameters), complete=False).save(folder)
