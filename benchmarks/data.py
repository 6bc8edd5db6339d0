"""How fast and how steady a training's data are: pictures a second and a core, start-up, going on, memory over time.

    python benchmarks/data.py                      # some three minutes
    python benchmarks/data.py --minutes 30         # and half an hour of memory
    PYTHONPATH=../older-checkout python benchmarks/data.py

Draws its own shards, JPEG pictures of noise, into a temporary folder. It uses `write_shards`, `ShardDataModule` and its
stream's `batches_from` alone, so that an older checkout can be measured by the same script.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import psutil

import icd_lightning  # noqa: F401  before torch
from icd_lightning.data.datamodule import ShardDataModule
from icd_lightning.data.shards import write_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="pixels of a picture's side")
    parser.add_argument("--resolution", type=int, default=512, help="pixels that a training asks for")
    parser.add_argument("--count", type=int, default=2000, help="pictures for the rate and the memory")
    parser.add_argument("--shards", type=int, default=2000, help="shards, of 20 small pictures each, for the start-up")
    parser.add_argument("--minutes", type=float, default=0.0, help="how long to watch the memory")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp())
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder)


def measure(options: argparse.Namespace, folder: Path) -> None:
    write_shards(pictures(options.count, options.side), folder / "photos", shard_size=250, parameters={})
    write_shards(pictures(20 * options.shards, 8), folder / "many", shard_size=20, parameters={})
    print(f"{options.count} JPEG pictures of {options.side} pixels, brought to {options.resolution}, batches of 16")
    for workers in (1, 2):
        print(f"  {workers} workers: {rate(folder / 'photos', options.resolution, workers):.0f} pictures a second")
    first, again = (started(folder / "many") for _ in range(2))
    print(f"{options.shards} shards of 20 pictures: ready in {first:.1f} s, the next time in {again:.1f} s")
    for position in (0, 1000):
        print(f"  first batch at batch {position}: {resumed(folder / 'many', position):.2f} s")
    if options.minutes:
        watch(folder / "photos", options.resolution, options.minutes)


def pictures(count: int, side: int) -> Iterator[dict]:
    """Pictures of noise that is smooth enough to weigh what photographs do; a hundred of them, over and over."""
    from io import BytesIO

    import numpy as np
    from PIL import Image

    rng, files = np.random.default_rng(0), []
    for _ in range(min(count, 100)):
        noise = Image.fromarray(rng.integers(0, 256, (max(1, side // 4), max(1, side // 4), 3), dtype=np.uint8))
        stream = BytesIO()
        noise.resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    for number in range(count):
        yield {"__key__": f"{number:08d}", "jpg": files[number % len(files)], "txt": b"a photo", "json": b"{}"}


def opened(folder: Path, resolution: int, workers: int, **options) -> ShardDataModule:
    data = ShardDataModule(str(folder), batch_size=16, resolution=resolution, num_workers=workers, **options)
    data.setup("fit")
    return data


def rate(folder: Path, resolution: int, workers: int) -> float:
    """Pictures a second, after the first 20 batches."""
    data = opened(folder, resolution, workers)
    batches = iter(data.train_dataloader())
    for _ in islice(batches, 20):
        pass
    start, count = time.perf_counter(), sum(len(batch.keys) for batch in batches)
    seconds = time.perf_counter() - start
    data.teardown()
    return count / seconds


def started(folder: Path) -> float:
    """Seconds until a training may begin."""
    start = time.perf_counter()
    opened(folder, 8, 0)
    return time.perf_counter() - start


def resumed(folder: Path, position: int) -> float:
    """Seconds until the first batch of a run that goes on at `position`."""
    data = opened(folder, 8, 0)
    start = time.perf_counter()
    next(data.stream.batches_from(position, data.train_tally))
    return time.perf_counter() - start


def watch(folder: Path, resolution: int, minutes: float) -> None:
    """Print the memory that this process and its two workers have for themselves."""
    data = opened(folder, resolution, 2)
    loader, end, seen, next_line = data.train_dataloader(), time.monotonic() + 60 * minutes, 0, 0.0
    taken: list[float] = []
    while time.monotonic() < end:
        for batch in loader:
            seen += len(batch.keys)
            if time.monotonic() >= next_line:
                processes = [psutil.Process(), *psutil.Process(os.getpid()).children(recursive=True)]
                memory = sum(process.memory_full_info().uss for process in processes) / 2**20
                print(f"  {minutes - (end - time.monotonic()) / 60:5.1f} min, {seen:8,} pictures: {memory:6.0f} MiB")
                taken.append(memory)
                next_line = time.monotonic() + 60
            if time.monotonic() >= end:
                break
    data.teardown()
    first, second = (statistics.mean(half) for half in (taken[: len(taken) // 2] or taken, taken[len(taken) // 2 :]))
    print(f"  {min(taken):.0f} to {max(taken):.0f} MiB; averages of the halves: {first:.0f} and {second:.0f}")


if __name__ == "__main__":
    main()
