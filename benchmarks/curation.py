"""Curate procedural pairs with planted faults: recall and precision of each, and pictures a second by workers.

    python benchmarks/curation.py --folder outputs/curation --count 10000

Rates of 0 (a plain loop), 1 and 2 workers are of one run, in turns, so that they can be compared on any machine.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

import icd_lightning  # noqa: F401  first, for torchvision
from icd_lightning.data.curation.curate import Curation, curate
from icd_lightning.data.curation.duplicates import Duplicates
from icd_lightning.data.curation.engine import Engine
from icd_lightning.data.curation.recipe import Recipe
from icd_lightning.data.curation.stages import ShortSide
from icd_lightning.data.shards import encode_sample, write_shards
from icd_lightning.metrics.stage import Metric
from icd_lightning.tiny.rendering import render
from icd_lightning.tiny.scenes import scene_at

SIDE, SEED, BENCHMARK_SEED = 128, 5, 6
EXPECTED = {
    "copy": "duplicate",
    "near": "near_duplicate",
    "tiny": "short_side",
    "corrupt": "corrupt_image",
    "leaked": "leaked",
    "other": "agreement",  # the caption is another scene's
}
KINDS = (*EXPECTED, *("clean",) * 14)  # each fault in every twentieth pair
BEFORE = 10  # a copy is of the picture so many before it, which is clean


def planted(count: int) -> Iterator[dict]:
    """Pairs whose key begins with what is wrong with them."""
    for index in range(count):
        kind = KINDS[index % len(KINDS)] if index >= BEFORE else "clean"
        world = BENCHMARK_SEED if kind == "leaked" else SEED
        scene = scene_at(world, index - BEFORE if kind in ("copy", "near") else index)
        caption = scene_at(SEED, index + 1_000_000).caption() if kind == "other" else scene.caption()
        image = Image.fromarray(render(scene, SIDE))
        sample = encode_sample(f"{kind}{index:08d}", render(scene, SIDE), caption, {}, format="png")
        if kind in ("near", "leaked"):
            image = ImageEnhance.Brightness(ImageOps.crop(image, 1).resize((SIDE, SIDE))).enhance(1.05)
            sample["jpg"] = _jpeg(image)
            del sample["png"]
        elif kind == "tiny":
            sample["png"] = encode_sample("x", render(scene, 24), "x", {}, format="png")["png"]
        elif kind == "corrupt":
            sample["png"] = sample["png"][:100]
        yield sample


def _jpeg(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "JPEG", quality=80)
    return stream.getvalue()


def plant(folder: Path, count: int) -> tuple[Path, Path]:
    """The shards of pairs and the folder of the benchmark's pictures."""
    shards, benchmark = folder / "raw", folder / "benchmark"
    write_shards(planted(count), shards, shard_size=1000, parameters={"planted": count}, total=count)
    benchmark.mkdir(parents=True, exist_ok=True)
    for index in range(KINDS.index("leaked"), count, len(KINDS)):
        Image.fromarray(render(scene_at(BENCHMARK_SEED, index), SIDE)).save(benchmark / f"{index:08d}.png")
    return shards, benchmark


def score(curation: Curation) -> None:
    """Print recall and precision of each fault's reason."""
    found = [
        (key[:-8], why)
        for plan in curation.plans()
        for _, record, whys in curation.reasons(plan)
        for key, why in zip(record.key, whys.tolist(), strict=True)
    ]
    print("| fault | planted | dropped for it | recall | precision |\n| --- | --: | --: | --: | --: |")
    for kind, reason in EXPECTED.items():
        planted, dropped = (sum(pair[place] == name for pair in found) for place, name in enumerate((kind, reason)))
        right = found.count((kind, reason))
        print(f"| {kind} | {planted} | {dropped} | {right / max(planted, 1):.3f} | {right / max(dropped, 1):.3f} |")
    clean = [why for kind, why in found if kind == "clean"]
    print(f"\n{clean.count('') / len(clean):.3f} of {len(clean)} clean pairs are kept")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    shards, benchmark = plant(options.folder, options.count)
    stages = (ShortSide(least=64), Metric(metric="tiny-agreement", least=0.7, side=64, reason="agreement"))
    recipe = Recipe(stages, Duplicates(benchmarks=[str(benchmark)]), resolution=SIDE)
    for workers in options.workers:
        out = options.folder / f"by-{workers}"
        start = time.perf_counter()
        _, new = curate([str(shards)], out, recipe, shard_size=1000, engine=Engine(workers), overwrite=True)
        seconds = time.perf_counter() - start
        _, again = curate([str(shards)], out, recipe, shard_size=1000, engine=Engine(workers))
        memory = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        rate = options.count / seconds
        print(f"{workers} workers: {seconds:.0f} s, {rate:.0f} pictures a second, {memory >> 10} MiB at most a process")
        if again or not new:
            raise RuntimeError(f"{out} was made again, or not at all")
    score(Curation(out, recipe, 1000))


if __name__ == "__main__":
    main()
