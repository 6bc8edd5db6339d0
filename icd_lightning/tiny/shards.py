"""Shards of scenes: the tiny world as a data set on disk."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from typing import Any, Literal

from icd_lightning.data.manifest import Manifest
from icd_lightning.data.shards import ENCODINGS, encode_sample, find_reusable, write_shards
from icd_lightning.processes import in_processes
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import scene_at

LEAST = {"count": 1, "shard_size": 1, "size": 8, "seed": 0}


def write_scenes(
    out: str, settings: dict[str, Any], *, overwrite: bool, num_workers: int | None
) -> tuple[Manifest, bool]:
    """Write scenes 0 to `count` of the world `seed`, unless `out` holds just these; also return whether it was done.

    settings: count, shard_size, format, seed and size of `icd data shapes`.
    """
    for name, minimum in LEAST.items():
        if settings[name] < minimum:
            raise ValueError(f"{name} {settings[name]} must be at least {minimum}")
    if settings["format"] not in ENCODINGS:
        raise ValueError(f"format {settings['format']!r} is not one of {', '.join(ENCODINGS)}")
    count, shard_size = settings["count"], settings["shard_size"]
    parameters = {"world": "shapes", "version": _version(settings["size"]), **settings}
    if reused := find_reusable(out, parameters, overwrite=overwrite):
        return reused, False
    encoded = partial(_encoded_scene, **{name: settings[name] for name in ("seed", "size", "format")})
    workers = min(num_workers or os.cpu_count() or 1, 1 + count // 200)  # a process pays from some hundred pictures on
    samples = in_processes(encoded, range(count), workers, chunksize=64)
    options = {"shard_size": shard_size, "parameters": parameters, "total": count, "overwrite": overwrite}
    return write_shards(samples, out, **options), True


def _encoded_scene(index: int, *, seed: int, size: int, format: Literal["png", "jpg"]) -> dict[str, Any]:
    scene = scene_at(seed, index)
    return encode_sample(f"{index:08d}", render(scene, size), scene.caption(), scene.to_dict(), format=format)


def _version(size: int) -> str:
    """Changes with the world: shards that an older program drew are not taken for today's."""
    digest = hashlib.sha256()
    for index in range(8):
        scene = scene_at(0, index)
        digest.update(scene.caption().encode() + render(scene, size).tobytes())
    return digest.hexdigest()[:12]
