"""Latents on disk: shards of pictures become shards of what the autoencoder's encoder made of them.

Training then needs no encoder. Kept are the posterior's mean and log-variance, not one sample of it, so that every
epoch draws fresh latents; and, if asked for, what text encoders make of the captions.

Several processes may share the shards. Each leaves a record of every shard it has finished in `PROGRESS`, written as
whole as the shards are; nothing is locked. Whoever finds them all there writes the complete manifest.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from icd_lightning.data.decoding import Sample, SampleDecoder, collate
from icd_lightning.data.manifest import PROGRESS, Manifest, ShardRecord, check_shard, remove_shards, write_shard
from icd_lightning.data.shards import Shard, open_shards
from icd_lightning.data.tally import Tally, left_out
from icd_lightning.data.tars import MOMENTS, TEXT, is_local
from icd_lightning.data.uncounted import read_shard
from icd_lightning.files import read_object, write_json
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
) -> Manifest:
    """Write shard for shard the moments of pictures to `out`, each under its name; go on where an earlier call stopped.

    encode(images (B, 3, H, W) in [-1, 1]) gives moments, which are kept as float16; `autoencoder` is its fingerprint,
    kept with each sample. `text`, a fingerprint too and a function, does the same for captions: encode_text(B captions)
    gives EMBEDS by name. Pictures that cannot be used are left out and counted. `part` (i, n) does every n-th shard
    from the i-th on; the manifest returned is complete once every shard is done, by whomever. Raises ValueError if
    `out` holds anything else than a part of this very set.
    """
    folder, shards = Path(out), _by_name(open_shards(urls))
    if any(is_local(shard.url) and Path(shard.url).resolve().parent == folder.resolve() for shard in shards.values()):
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
    existing = Manifest.of_set(folder, parameters)
    done = {name for name, record in _records(folder).items() if not check_shard(folder / name, record, level="bytes")}
    missing = [name for name in list(shards)[part[0] :: part[1]] if name not in done]
    if missing and existing is None:
        Manifest(parameters, complete=False).save(folder)
    tally = Tally(stall_timeout=60.0)
    encoder = _Encoder(encode, text and text[1], decoder, settings, batch_size)
    for name in missing:
        broken = tally.counts()["broken_shard"]
        record = write_shard(encoder.samples(shards[name], tally), folder / name)
        # a remote shard that broke may read better another time
        if is_local(shards[name].url) or tally.counts()["broken_shard"] == broken:
            write_json(folder / PROGRESS / f"{name}.json", asdict(record))
    if skipped := left_out(tally.counts()):
        logger.warning("left out: %s", skipped)
    return _completed(folder, parameters, list(shards))


@dataclass(frozen=True)
class _Encoder:
    """Turns the samples of a shard into samples of moments, and of embeddings where those are wanted."""

    encode: Callable[[torch.Tensor], torch.Tensor]
    encode_text: EncodeText | None
    decoder: SampleDecoder
    settings: dict[str, Any]
    batch_size: int

    def samples(self, shard: Shard, tally: Tally) -> Iterator[dict[str, Any]]:
        """Yield {"__key__": str, MOMENTS, perhaps TEXT, "json", "txt": bytes} for each picture that can be used."""
        raws = progress(read_shard(shard.url, tally), f"encoding {shard.url}", shard.samples)
        decoded = tally.usable(self.decoder.decode, raws)
        while True:
            tally.awaited()  # the time that the encoder took is no silence of the source
            batch = list(islice(decoded, self.batch_size))
            if not batch:
                return
            if batch[0].picture is None:
                raise ValueError(f"{shard.url} holds latents already: name shards of pictures")
            for sample, moments, text in zip(batch, self._moments(batch), self._texts(batch), strict=True):
                stream = BytesIO()
                np.save(stream, moments)
                about = json.dumps(sample.metadata | {"moments": self.settings}, sort_keys=True, separators=(",", ":"))
                files = {MOMENTS: stream.getvalue(), **text, "json": about.encode(), "txt": sample.caption.encode()}
                yield {"__key__": sample.key, **files}

    def _moments(self, samples: list[Sample]) -> list[NDArray[np.float16]]:
        """Encode pictures, those of one size together; one (C, h, w) for each."""
        by_size = defaultdict(list)
        for index, sample in enumerate(samples):
            by_size[sample.size].append(index)
        moments: dict[int, NDArray[np.float16]] = {}
        for indices in by_size.values():
            encoded = self.encode(collate([samples[index] for index in indices]).images)
            moments |= zip(indices, _half(encoded, "the autoencoder gives latents", samples[indices[0]]), strict=True)
        return [moments[index] for index in range(len(samples))]

    def _texts(self, samples: list[Sample]) -> list[dict[str, bytes]]:
        """Encode captions, where that is wanted; a file for each, by its extension."""
        if self.encode_text is None:
            return [{}] * len(samples)
        encoded = self.encode_text([sample.caption for sample in samples])
        source = "the text encoder gives embeddings"
        embeds = {name: _half(values, source, samples[0]) for name, values in encoded.items()}
        return [{TEXT: save({name: values[index] for name, values in embeds.items()})} for index in range(len(samples))]


def _half(values: torch.Tensor, source: str, near: Sample) -> NDArray[np.float16]:
    """In float16, as they are kept; ValueError for what is not finite in it."""
    half = values.to("cpu", torch.float16).numpy()
    if not np.isfinite(half).all():
        what = "too large for float16, in which they are kept" if values.isfinite().all() else "not finite"
        raise ValueError(f"{source} that are {what}, near {near.key}: take another encoder, or train without caching")
    return half


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


def _records(folder: Path) -> dict[str, ShardRecord]:
    """All shards that are finished, by name."""
    records = {}
    for file in (folder / PROGRESS).glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # another process has just completed the set
            try:
                records[file.stem] = ShardRecord(**read_object(file))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is no record of a shard ({error}): remove it, and call again") from error
    manifest = Manifest.load(folder)  # after those, which are removed once it has them all
    return (manifest.shards if manifest else {}) | records


def _completed(folder: Path, parameters: dict[str, Any], names: list[str]) -> Manifest:
    """The manifest as it is now; complete, on disk too, if every shard is done."""
    records = _records(folder)
    own = {name: records.pop(name) for name in names if name in records}
    manifest = Manifest(parameters, own | records, complete=len(own) == len(names))
    if manifest.complete:
        if manifest != Manifest.load(folder):
            manifest.save(folder)
        shutil.rmtree(folder / PROGRESS, ignore_errors=True)
        for stale in folder.glob(".*.tar-*.tmp"):  # another process may be writing the manifest
            stale.unlink(missing_ok=True)
    return manifest
