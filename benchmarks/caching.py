"""Pictures a second that `icd data cache-latents` encodes: one thing after another, and side by side in threads.

    python benchmarks/caching.py                                                # 512 pixels, 4 ms a picture to encode
    python benchmarks/caching.py --size 1024 --source 2048 --encode-ms 16 --threads 2,4,8

JPEGs are drawn, `--source` pixels a side (by default `--size`), and shards of them written to a temporary folder. The
encoder is one in name only: it waits for `--encode-ms` a picture, as one waits for a GPU; what it gives has the size of
SD's latents. All ways take turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import icd_lightning  # noqa: F401  first: it mends torchvision beside a CPU build of torch

import numpy as np  # isort: skip
import torch  # isort: skip
from measuring import in_turns, run, table  # isort: skip
from icd_lightning.data.decoding import SampleDecoder
from icd_lightning.data.latents import Caching, Encoders, cache_latents
from icd_lightning.data.shards import encode_sample, write_shards


class Cost(NamedTuple):
    """Of one pass over all pictures: seconds that passed, and seconds of processors."""

    seconds: float
    processor: float


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="caching-") as name:
        folder = Path(name)
        draw(folder / "pictures", args.count, args.source or args.size, args.shard_size)
        ways = [0, *(int(number) for number in args.threads.split(","))]
        forms = {number: way(folder, number, args) for number in ways}
        costs = in_turns(forms, dict.fromkeys(ways, args.repeats))
    report(costs, args.count)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="pixels a side to encode")
    parser.add_argument("--source", type=int, help="pixels a side of the JPEGs; by default those to encode")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--shard-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--encode-ms", type=float, default=4.0, help="what the encoder takes for a picture")
    parser.add_argument("--threads", default="1,2,4", help="how many decode, each number a way of its own")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def draw(folder: Path, count: int, side: int, shard_size: int) -> None:
    """Write JPEGs of smooth colours with some noise, which take about as long to decode as photographs."""
    noise = np.random.default_rng(0)

    def picture() -> np.ndarray:
        coarse = torch.from_numpy(noise.random((1, 3, 16, 16), dtype=np.float32))
        smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")[0].permute(1, 2, 0).numpy()
        return (smooth * 235 + noise.normal(0, 6, (side, side, 1))).clip(0, 255).astype(np.uint8)

    samples = (encode_sample(f"{n:06d}", picture(), f"picture {n}", {}, format="jpg") for n in range(count))
    write_shards(samples, folder, shard_size=shard_size, parameters={})


def way(folder: Path, num_workers: int, args: argparse.Namespace) -> Callable[[int], Cost]:
    """Caching with so many threads that decode; with 0 nothing goes on side by side."""

    def encode(images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 8, H / 8, W / 8)."""
        until = time.perf_counter() + args.encode_ms / 1000 * len(images)
        moments = images[:, :, ::8, ::8].repeat(1, 3, 1, 1)[:, :8]
        time.sleep(max(0.0, until - time.perf_counter()))
        return moments

    def cached(_: int) -> Cost:
        start = time.perf_counter(), time.process_time()
        caching = Caching(Encoders("none", encode), SampleDecoder(args.size), args.batch, num_workers)
        cache_latents(str(folder / "pictures"), folder / "latents", caching)
        cost = Cost(time.perf_counter() - start[0], time.process_time() - start[1])
        shutil.rmtree(folder / "latents")
        return cost

    return cached


def report(costs: dict[int, list[Cost]], count: int) -> None:
    """Print the medians, and the range of pictures a second."""
    before = statistics.median(cost.seconds for cost in costs[0])
    rows = []
    for number, found in costs.items():
        seconds, processor = (statistics.median(values) for values in zip(*found, strict=True))
        rates = [count / cost.seconds for cost in found]
        rows.append(
            [
                f"threads, {number} to decode" if number else "one after another",
                f"{count / seconds:.1f}",
                f"{min(rates):.1f} - {max(rates):.1f}",
                f"{before / seconds:.2f}",
                f"{count / processor:.1f}",
                f"{processor / seconds:.2f}",
            ]
        )
    columns = ["way", "pictures/s", "min - max", "ratio", "pictures/s of a busy core", "cores busy"]
    sys.stdout.write(f"{os.cpu_count()} cores, torch {torch.__version__}\n{table(columns, rows)}\n")


if __name__ == "__main__":
    run(main)
