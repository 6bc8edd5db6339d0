"""Latents on disk: shards of pictures become shards of what the autoencoder's encoder made of them.

Training then needs no encoder. Kept are the posterior's mean and log-variance, not one sample of it, so that every
epoch draws fresh latents.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icd_lightning.data.decoding import MOMENTS, Decoded, RejectedError, SampleDecoder, Tally, collate
from icd_lightning.data.manifest import MANIFEST, Manifest, check_shard
from icd_lightning.data.shards import open_shards, with_progress, write_shard
from icd_lightning.data.stream import Piece

logger = logging.getLogger(__name__)


def cache_latents(
    urls: str | Sequence[str],
    out: str | Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    autoencoder: str,
    decoder: SampleDecoder,
    batch_size: int = 32,
    overwrite: bool = False,
) -> Manifest:
    """Write shard for shard the moments of pictures to `out`, each under its name; go on where an earlier call stopped.

    encode(images (B, 3, R, R) in [-1, 1]) gives moments, which are kept as float16; `autoencoder` is its fingerprint,
    kept with each sample. Pictures that cannot be used are left out and counted. Raises ValueError if `out` holds
    anything else than a part of this very set.
    """
    shards, folder = open_shards(urls), Path(out)
    names = [Path(shard.url).name for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError(f"two shards are named {max(names, key=names.count)}: cache their latents to different folders")
    made = {"resolution": decoder.resolution, "autoencoder": autoencoder}
    parameters = {"latents": made, "caption_field": decoder.caption_field, "min_size": decoder.min_size}
    manifest = _started(folder, parameters, overwrite=overwrite)
    tally = Tally()
    for shard, name in zip(shards, names, strict=True):
        record = manifest.shards.get(name)
        if record and check_shard(folder / name, record, level="bytes") is None:
            continue
        raws = with_progress(Piece(shard.url, 0, None).read(tally), f"encoding {name}", shard.samples)
        samples = _encoded(raws, encode, decoder=decoder, made=made, batch_size=batch_size, tally=tally)
        record = write_shard(samples, folder / name)
        manifest = replace(manifest, shards={**manifest.shards, name: record})
        manifest.save(folder)
    manifest = replace(manifest, complete=True)
    manifest.save(folder)
    if skipped := {reason: n for reason, n in tally.counts().items() if n and reason != "passed"}:
        logger.warning("left out: %s", ", ".join(f"{reason} {n}" for reason, n in skipped.items()))
    return manifest


def _started(folder: Path, parameters: dict[str, Any], *, overwrite: bool) -> Manifest:
    manifest = Manifest.load(folder)
    if overwrite or (manifest is None and not any(folder.glob("*.tar"))):
        for stale in (folder / MANIFEST, *folder.glob("*.tar"), *folder.glob(".*.tmp")):
            stale.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(parameters, complete=False)
        manifest.save(folder)
    if manifest is None or manifest.parameters != parameters:
        raise ValueError(f"{folder} holds other shards; choose another folder or pass --overwrite")
    return replace(manifest, complete=False)


def _encoded(
    raws: Iterable[dict[str, Any]],
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    decoder: SampleDecoder,
    made: dict[str, Any],
    batch_size: int,
    tally: Tally,
) -> Iterator[dict[str, Any]]:
    decoded = _decoded(raws, decoder, tally)
    while samples := list(islice(decoded, batch_size)):
        moments = encode(collate(samples).images).to("cpu", torch.float16).numpy()
        for sample, moment in zip(samples, moments, strict=True):
            stream = BytesIO()
            np.save(stream, moment)
            text = json.dumps(sample.metadata | {"moments": made}, sort_keys=True, separators=(",", ":"))
            yield {
                "__key__": sample.key,
                MOMENTS: stream.getvalue(),
                "json": text.encode(),
                "txt": sample.caption.encode(),
            }


def _decoded(raws: Iterable[dict[str, Any]], decoder: SampleDecoder, tally: Tally) -> Iterator[Decoded]:
    for raw in raws:
        try:
            yield decoder.decode(raw)
            tally.passed()
        except RejectedError as error:
            tally.skipped(error.reason, error.detail)
