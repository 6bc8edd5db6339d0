"""Latents on disk: shards of pictures become shards of what the autoencoder's encoder made of them.

Training then needs no encoder. Kept are the posterior's mean and log-variance, not one sample of it, so that every
epoch draws fresh latents; and, if asked for, what text encoders make of the captions.

Several processes may share the shards. Each leaves a record of every shard it has finished in `PROGRESS`, written as
whole as the shards are; nothing is locked. Whoever finds them all there writes the complete manifest.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from icd_lightning.data.decoding import Sample, SampleDecoder, collate
from icd_lightning.data.manifest import PROGRESS, Manifest, complete_set, finished_shards, remove_shards, write_shard
from icd_lightning.data.remote import AnyPath, folder_at
from icd_lightning.data.shards import Shard, open_shards
from icd_lightning.data.tally import Tally, left_out
from icd_lightning.data.tars import MOMENTS, TEXT, Raw, is_local
from icd_lightning.data.threads import side_by_side, submitted
from icd_lightning.data.uncounted import read_shard
from icd_lightning.files import write_json
from icd_lightning.progress import progress

logger = logging.getLogger(__name__)

EncodeText = Callable[[list[str]], dict[str, torch.Tensor]]


def cache_latents(
    urls: str | Sequence[str],
    out: str | Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    autoencoder: str,
    text: tuple[str, EncodeText] | None = None,
    decoder: SampleDecoder,
    batch_size: int = 32,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    num_workers: int = 4,
    allow_broken: bool = False,
) -> Manifest:
    """Write shard for shard the moments of pictures to `out`, each under its name; go on where an earlier call stopped.

    encode(images (B, 3, H, W) in [-1, 1]) gives moments, which are kept as float16; `autoencoder` is its fingerprint,
    kept with each sample. `text`, a fingerprint too and a function, does the same for captions: encode_text(B captions)
    gives EMBEDS by name. Pictures that cannot be used are left out and counted. `part` (i, n) does every n-th shard
    from the i-th on; the manifest returned is complete once every shard is done, by whomever. `num_workers` threads
    decode while this one encodes and another writes; with 0 one thing is done after another, to the same bytes.

    Raises ValueError if `out`, a folder or the url of one in a store, holds anything else than a part of this very set,
    and, once the others are done, for shards that could not be read to their end: those get no latents, or with
    `allow_broken` those of what could be read.
    """
    if num_workers < 0:
        raise ValueError(f"num_workers {num_workers} must be at least 0")
    folder, shards = folder_at(out), _by_name(open_shards(urls))
    if any(_lies_in(folder, shard.url) for shard in shards.values()):
        raise ValueError(f"{folder} holds the pictures themselves: choose another folder for their latents")
    settings: dict[str, Any] = {"resolution": decoder.resolution, "autoencoder": autoencoder}
    settings |= {"buckets": True} if decoder.buckets else {}
    settings |= {"text_encoder": text[0]} if text else {}
    parameters = {"latents": settings, "caption_field": decoder.caption_field, "min_size": decoder.min_size}
    sources = Manifest.beside(shard.url for shard in shards.values())
    parameters["source"] = [manifest.parameters for manifest in sources.values()]
    if overwrite:
        if part[1] > 1:
            raise ValueError(f"to overwrite would remove what other parts write: remove {folder} before you start them")
        remove_shards(folder)
    missing = _missing(folder, parameters, list(shards)[part[0] :: part[1]])
    encoder = _Encoder(encode, text and text[1])
    caching = _Caching(encoder, decoder, settings, batch_size, folder, num_workers, allow_broken)
    caching.run({name: shards[name] for name in missing})
    manifest = complete_set(folder, parameters, list(shards))
    caching.report()
    return manifest


class _Batch(NamedTuple):
    """Pictures of one shard, those of one size together; or none, and whether the shard was read to its end."""

    samples: list[Sample]
    images: Sequence[tuple[list[int], torch.Tensor]] = ()  # which samples they are, (B, 3, H, W)
    whole: bool | None = None

    @classmethod
    def of(cls, samples: list[Sample]) -> _Batch:
        by_size = defaultdict(list)
        for index, sample in enumerate(samples):
            by_size[sample.size].append(index)
        images = [(indices, collate([samples[index] for index in indices]).images) for indices in by_size.values()]
        return cls([sample._replace(picture=None) for sample in samples], images)


class _BrokenShardError(Exception):
    """A shard could not be read to its end, and what it gave shall not be kept."""


@dataclass(frozen=True)
class _Caching:
    """Decodes pictures in threads, encodes them in this one, writes in another."""

    encoder: _Encoder
    decoder: SampleDecoder
    settings: dict[str, Any]
    batch_size: int
    folder: AnyPath
    num_workers: int
    allow_broken: bool
    broken: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=lambda: Tally(stall_timeout=60.0))  # of the thread that reads

    def run(self, shards: Mapping[str, Shard]) -> None:
        """Write the latents of shards, each under its name, and a record of it."""
        counts = [shard.samples for shard in shards.values()]
        total = None if None in counts else sum(count // self.batch_size + 1 for count in counts)

        def write(batches: Iterator[_Batch]) -> None:
            with closing(progress(batches, f"encoding to {self.folder}", total)) as shown:
                for name in shards:
                    with suppress(_BrokenShardError):
                        record = write_shard(self._files(shown), self.folder / name)
                        write_json(self.folder / PROGRESS / f"{name}.json", asdict(record))

        batches = self._batches(shards.values())
        if self.num_workers:
            side_by_side(batches, self.encoder.encoded, write)
        else:
            write(map(self.encoder.encoded, batches))

    def report(self) -> None:
        """Tell what was left out; ValueError for broken shards, unless they are allowed."""
        if skipped := left_out(self.tally.counts()):
            logger.warning("left out: %s", skipped)
        more = f" and {len(self.broken) - 5} more" if len(self.broken) > 5 else ""
        which = f"shards that cannot be read to their end ({', '.join(self.broken[:5])}{more})"
        if self.broken and self.allow_broken:
            logger.warning("%s holds what could be read of %s", self.folder, which)
        elif self.broken:
            raise ValueError(
                f"{self.folder} lacks the latents of {which}: write or copy these again and run the same command, or "
                "pass --allow_broken to do without what they have lost"
            )

    def _batches(self, shards: Iterable[Shard]) -> Generator[_Batch, None, None]:
        """Yield the pictures of each shard that can be used, and then no more of it and whether that was all."""
        for shard in shards:
            self.tally.awaited()  # the time that the encoder took is no silence of the source
            before = self.tally.counts()["broken_shard"]
            read = closing(read_shard(shard.url, self.tally))
            with read as raws, closing(submitted(self._decoded, raws, self.num_workers)) as futures:
                decoded = self.tally.usable(Future.result, futures)
                while samples := list(islice(decoded, self.batch_size)):
                    yield _Batch.of(samples)
                    self.tally.awaited()
            whole = self.tally.counts()["broken_shard"] == before
            if whole and shard.damage:  # cut between samples, where reading sees nothing of it
                self.tally.broke(f"{shard.url}: {shard.damage}")
                whole = False
            self.broken.extend([] if whole else [shard.url])
            yield _Batch([], whole=whole)

    def _decoded(self, raw: Raw) -> Sample:
        sample = self.decoder.decode(raw)
        if sample.picture is None:
            raise ValueError(f"{raw['__url__']} holds latents already: name shards of pictures")
        return sample

    def _files(self, batches: Iterator[_Batch]) -> Iterator[dict[str, Any]]:
        """Yield {"__key__": str, MOMENTS, perhaps TEXT, "json", "txt": bytes} for each sample of the next shard."""
        for batch in batches:
            for sample in batch.samples:
                stream = BytesIO()
                np.save(stream, sample.moments)
                files = {MOMENTS: stream.getvalue()} | ({TEXT: save(sample.text)} if sample.text else {})
                about = json.dumps(sample.metadata | {"moments": self.settings}, sort_keys=True, separators=(",", ":"))
                yield {"__key__": sample.key, **files, "json": about.encode(), "txt": sample.caption.encode()}
            if batch.whole is False and not self.allow_broken:
                raise _BrokenShardError
            if batch.whole is not None:
                return


@dataclass(frozen=True)
class _Encoder:
    """Turns pictures into moments, and captions into embeddings where those are wanted."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    encode_text: EncodeText | None

    def encoded(self, batch: _Batch) -> _Batch:
        """The samples with moments (C, h, w) and perhaps embeddings in the place of their pictures."""
        moments: dict[int, NDArray[np.float16]] = {}
        for indices, images in batch.images:
            near = batch.samples[indices[0]]
            moments |= zip(indices, _half(self.encode(images), "the autoencoder gives latents", near), strict=True)
        made = zip(batch.samples, self._texts(batch.samples), strict=True)
        samples = [one._replace(moments=moments[index], text=text) for index, (one, text) in enumerate(made)]
        return batch._replace(samples=samples, images=())

    def _texts(self, samples: list[Sample]) -> list[dict[str, NDArray[np.float16]]]:
        """Encode captions, where that is wanted; embeddings by name for each."""
        if self.encode_text is None or not samples:
            return [{}] * len(samples)
        encoded = self.encode_text([sample.caption for sample in samples])
        source = "the text encoder gives embeddings"
        embeds = {name: _half(values, source, samples[0]) for name, values in encoded.items()}
        return [{name: values[index] for name, values in embeds.items()} for index in range(len(samples))]


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
        name = Path(shard.url).name
        if not name.endswith(".tar"):
            raise ValueError(f"{shard.url} must end with the name of a .tar: its latents get the same name")
        if name in named:
            raise ValueError(f"two shards are named {name}: cache their latents to different folders")
        named[name] = shard
    return named


def _missing(folder: AnyPath, parameters: dict[str, Any], names: list[str]) -> list[str]:
    """Which of these shards are still to be written; begins the set where there is none."""
    existing = Manifest.of_set(folder, parameters)
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.tar")}
    done = {name for name, record in finished_shards(folder).items() if sizes.get(name) == record.bytes}
    missing = [name for name in names if name not in done]
    if missing and existing is None:
        Manifest(parameters, complete=False).save(folder)
    return missing
