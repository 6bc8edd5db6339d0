"""`icd data ...`: write, choose and describe shards."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import Literal


def shapes(
    out: str = "data/shapes",
    *,
    count: int,
    shard_size: int = 1000,
    format: Literal["png", "jpg"] = "png",
    seed: int = 0,
    size: int = 64,
    overwrite: bool = False,
    num_workers: int | None = None,
) -> None:
    """Write captioned pictures of the tiny world as WebDataset shards; keep what is there if it is just this.

    Args:
        out: Folder for the shards and their manifest.json.
        count: Number of pictures.
        shard_size: Pictures in a shard.
        format: png keeps every pixel; jpg is several times faster to write and half as large.
        seed: Picture number i depends on seed and i alone.
        size: Pixels of a side.
        overwrite: Replace other shards in the folder.
        num_workers: Processes that draw; one for each core if not given.
    """
    from icd_lightning.tiny.shards import write_scenes

    settings = {"count": count, "shard_size": shard_size, "format": format, "seed": seed, "size": size}
    manifest, new = write_scenes(out, settings, overwrite=overwrite, num_workers=num_workers)
    text = f"{out} holds {counted(manifest.samples, 'picture')} in {counted(len(manifest.shards), 'shard')}"
    sys.stdout.write(f"{text}{'' if new else ' already; nothing to do'}\n")


def cache_latents(
    *urls: str,
    out: str,
    vae: str,
    text: str | None = None,
    resolution: int = 64,
    buckets: bool = False,
    min_size: int | None = None,
    caption_field: str | None = None,
    batch_size: int = 32,
    part: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    num_workers: int = 4,
    allow_broken: bool = False,
    ray_workers: int | None = 0,
    num_gpus: float = 0.0,
    ray_address: str | None = None,
) -> None:
    """Encode the pictures of shards once, so that training needs no encoder; go on where an earlier call stopped.

    Train on the result as on any shards, with the same resolution. Each epoch draws fresh samples of the posterior.

    Several processes may share the work: `torchrun --nproc_per_node 8 --no-python icd data cache-latents ...`, or jobs
    of their own with --part 0/8 to 7/8. Whichever ends last completes the set. Or Ray deals out the shards, here or on
    a cluster: --ray_workers 8 --num_gpus 1.

    Args:
        urls: Folders, shards, or patterns such as `shards/{00000..00009}.tar`; also http, s3, gs and pipe: urls.
        out: Folder for the new shards, one for each old one and named like it; also of a store: s3://bucket/latents.
        vae: The autoencoder: a folder in diffusers' layout, such as the `vae` folder of a model, or a hub id.
        text: Keep also what the text encoders of this model (a folder, a single file or a hub id) make of the captions.
        resolution: Pixels of a side. The short side is resized to it, the centre cut out.
        buckets: Keep the form of pictures that are not square: see the option of that name in training.
        min_size: Leave out pictures with a short side under this many pixels; if not given, those to be enlarged.
        caption_field: Take captions from this field of the json file instead of the txt or caption file.
        batch_size: Pictures encoded at once.
        part: Which share of the shards to do, as in 0/8; what torchrun says if not given, or else all.
        device: Where to encode: auto, cpu, cuda, cuda:1, ... With torchrun, auto is each process's own GPU.
        overwrite: Replace other shards in the folder.
        num_workers: Threads that decode pictures while others are encoded and written; 0: one thing after another.
        allow_broken: Keep what could be read of a shard that is cut or damaged, instead of leaving it for later.
        ray_workers: Processes of Ray, each with encoders and threads of its own; null: one for each processor; 0: this
            process alone, without Ray.
        num_gpus: GPUs of each process of Ray, or the share of one.
        ray_address: A Ray cluster to work on, such as auto or ray://host:10001; this machine if not given.
    """
    from icd_lightning.commands.weights import EncoderWeights
    from icd_lightning.data.curation.engine import Engine
    from icd_lightning.data.decoding import SampleDecoder
    from icd_lightning.data.latents import Caching
    from icd_lightning.data.latents import cache_latents as write

    share = _part(part or f"{os.environ.get('RANK', 0)}/{os.environ.get('WORLD_SIZE', 1)}")
    engine = Engine(ray_workers, ray_address, num_gpus, option="ray_workers")
    decoder = SampleDecoder(resolution, caption_field, min_size, buckets)
    encoders = EncoderWeights(vae, text, device).encoders()
    caching = Caching(encoders, decoder, batch_size, num_workers, allow_broken)
    manifest = write(urls, out, caching, part=share, engine=engine, overwrite=overwrite)
    shards = counted(len(manifest.shards), "shard")
    if manifest.complete and not manifest.samples:
        raise ValueError(
            f"{out} holds the latents of no picture, for all were left out: look at them with `icd data describe`, or "
            "change resolution, min_size or caption_field, and pass --overwrite"
        )
    if manifest.complete:
        outcome = f"{out} holds the latents of {counted(manifest.samples, 'picture')} in {shards}"
    else:
        outcome = f"part {share[0]}/{share[1]} is done; {out} holds {shards} and is complete once the others are"
    sys.stdout.write(f"{outcome}\n")


def describe(*urls: str, examples: int = 4) -> None:
    """Count the samples of shards, show their files, sizes and captions, hold them against manifest.json.

    Args:
        urls: Folders, shards, or patterns such as `shards/{00000..00009}.tar`.
        examples: Samples to look into in each shard.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from icd_lightning.data.shards import describe_shards
    from icd_lightning.texts import printable

    if examples < 1:
        raise ValueError(f"examples {examples} must be at least 1")
    rows, problems = describe_shards(list(urls), examples=examples)
    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # captions and names are no markup
    Console().print(table)
    if problems:
        first = printable("; ".join(problems[:5]))
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{counted(len(problems), 'problem')}: {first}{more}; write or copy the shards again")


def index(*urls: str, caption_field: str | None = None) -> None:
    """Index local shards, as training on them otherwise does first; copied with them, it serves training elsewhere.

    Beside each shard a file is left that says where its samples lie, how large they are and which cannot be used.

    Args:
        urls: Folders, shards, or patterns such as `shards/{00000..00009}.tar`.
        caption_field: Take captions from this field of the json file instead of the txt or caption file.
    """
    from icd_lightning.data.index import open_indexes
    from icd_lightning.data.shards import find_shards
    from icd_lightning.data.tally import REASONS, left_out
    from icd_lightning.data.tars import INDEX

    shards = find_shards(list(urls))
    indexes = open_indexes(shards, caption_field)
    if indexes is None:
        raise ValueError(f"{shards[0]} is not on this machine: index them where they are local, and copy the *{INDEX}")
    counts = Counter(REASONS[code] for index in indexes for code in index.reason.tolist() if code >= 0)
    samples = sum(len(index.reason) for index in indexes)
    damaged = [f"{url}: {index.damage}" for url, index in zip(shards, indexes, strict=True) if index.damage]
    if counts.total() == samples and (samples or not damaged):
        why = left_out(counts) or "the shards are empty"
        raise ValueError(f"none of {counted(samples, 'sample')} can be used ({why}): see `icd data describe`")
    text = f"{counted(samples, 'sample')} in {counted(len(shards), 'shard')} are indexed"
    if counts:
        text += f", {samples - counts.total()} of them can be used; not: {left_out(counts)}"
    if damaged:
        raise ValueError(f"{counted(len(damaged), 'damaged shard')}: {damaged[0]}; write or copy them again")
    sys.stdout.write(f"{text}\n")


def counted(count: int, name: str) -> str:
    return f"{count} {name}{'s' * (count != 1)}"


def _part(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"part {text!r} must be as in 0/8, 1/8, ... 7/8")
    return int(first), int(last)


def curate(
    *inputs: str,
    out: str,
    config: str,
    shard_size: int = 10000,
    num_workers: int | None = None,
    num_gpus: float = 0.0,
    ray_address: str | None = None,
    overwrite: bool = False,
) -> None:
    """Choose pairs of pictures and captions by a recipe, and write them as shards to train on.

    What was interrupted goes on; the same command again does nothing; with further inputs it does these alone. Look at
    what was kept and dropped by `icd data report`.

    Args:
        inputs: Shards of img2dataset or others, .parquet, .csv or COCO's .json beside its pictures; folders and
            patterns of these; also hf://datasets/... and other urls.
        out: Folder for the new shards; all workers must see it.
        config: The recipe: a file such as conf/data/curate/laion_sd15.yaml.
        shard_size: Most pairs in a shard; those of one call get equally many, or one less.
        num_workers: Processes of Ray; one for each processor if not given; 0: this process alone, without Ray.
        num_gpus: GPUs of each process, or the share of one, for metrics such as clip-t.
        ray_address: A Ray cluster to work on, such as auto or ray://host:10001; this machine if not given.
        overwrite: Replace other shards in the folder.
    """
    from icd_lightning.data.curation.curate import curate as write
    from icd_lightning.data.curation.engine import Engine
    from icd_lightning.data.curation.recipe import read_recipe

    if not inputs:
        raise ValueError("curate takes at least one INPUT: shards, .parquet, .csv or COCO's .json")
    engine, recipe = Engine(num_workers, ray_address, num_gpus), read_recipe(config)
    manifest, new = write(list(inputs), out, recipe, shard_size=shard_size, engine=engine, overwrite=overwrite)
    about = manifest.parameters
    dropped = ", ".join(f"{reason} {count}" for reason, count in about["dropped"].items())
    text = (
        f"{out} holds {about['kept']} of {counted(about['read'], 'pair')} in {counted(len(manifest.shards), 'shard')}"
    )
    text += f"; dropped: {dropped}" if dropped else ""
    sys.stdout.write(f"{text}{'' if new else '; nothing new to do'}\n")


def report(folder: str, *, output: str | None = None, examples: int = 8) -> None:
    """Draw a page of what `icd data curate` kept and dropped: counts by reason, histograms, and pictures of each kind.

    Args:
        folder: What `icd data curate` wrote.
        output: Folder for report.html and report.png; that of the shards if not given.
        examples: Pictures of each kind, read again from where they came from.
    """
    from icd_lightning.evaluation.curation import curation_report
    from icd_lightning.evaluation.report import write_report

    if not 1 <= examples <= 64:
        raise ValueError(f"examples {examples} must lie between 1 and 64")
    page, _ = write_report(curation_report(folder, examples), output or folder)
    sys.stdout.write(f"{page} shows it\n")
