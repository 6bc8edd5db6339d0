"""`icd data curate` and `icd data report`: from raw pairs to shards, and a page that shows what became of them."""

from __future__ import annotations


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
    from rich.console import Console

    from icd_lightning.commands.data import counted
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
    Console().print(text if new else f"{text}; nothing new to do", soft_wrap=True, markup=False, highlight=False)


def report(folder: str, *, output: str | None = None, examples: int = 8) -> None:
    """Draw a page of what `icd data curate` kept and dropped: counts by reason, histograms, and pictures of each kind.

    Args:
        folder: What `icd data curate` wrote.
        output: Folder for report.html and report.png; that of the shards if not given.
        examples: Pictures of each kind, read again from where they came from.
    """
    from rich.console import Console

    from icd_lightning.evaluation.curation import curation_report
    from icd_lightning.evaluation.report import write_report

    if not 1 <= examples <= 64:
        raise ValueError(f"examples {examples} must lie between 1 and 64")
    page, _ = write_report(curation_report(folder, examples), output or folder)
    Console().print(f"{page} shows it", soft_wrap=True, markup=False, highlight=False)
