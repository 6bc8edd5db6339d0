"""`icd eval`: methods on benchmarks; `icd condense`: of results, what ships with the notebooks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from icd_lightning.commands.weights import Weights
from icd_lightning.files import check_folder

log = logging.getLogger(__name__)


def evaluate(
    *,
    benchmark: str = "scenes",
    method: str | None = None,
    metrics: str | None = None,
    data: str | None = None,
    images: str | None = None,
    natural: bool = False,
    count: int | None = None,
    guidance_scale: float | None = None,
    tau: float | None = None,
    grid: str = "",
    seed: int | None = None,
    batch_size: int | None = None,
    ddim: bool = True,
    out: str | None = None,
    **options: Any,
) -> None:
    """Measure methods: to noise and back, generation, guidance, edits.

    icd eval                                                       a tour of the tiny family, with DDIM-50 beside it
    icd eval --benchmark tiny_edit --method icd,ddim               edits of scenes whose true results are known
    icd eval --benchmark inversion --data captions_val2014.json --images val2014 --count 5000 MODEL
    icd eval --benchmark piebench --data PIE-Bench --method icd_p2p --grid "tau=0.6,0.8 cross_replace=0.2" MODEL

    where MODEL stands for --model FOLDER --guided_unet FILE --forward FILE --reverse FILE, as of `icd edit --help`.

    A run writes PNG pictures, a row for each of them in rows.parquet, and means with 95 % intervals. Stopped and called
    again it goes on; under torchrun its ranks share the pictures.

    Args:
        benchmark: scenes, the tour; inversion (Tables 2 and 5); generation (Table 4; with --grid Fig. 5); guidance
            (Table 1, Fig. 4); piebench, coco_edit; tiny_edit, whose scenes have known true results; or the path of a
            benchmark of yours, package.module.NAME.
        method: Comma-separated: icd (edits as suits the model), icd_p2p (by Prompt-to-Prompt), icd_swap (by swapping
            the prompt), untrained (the teacher through the students' jumps), ddim, ... or all; by default icd, of
            `scenes` ddim, untrained and icd.
        metrics: Comma-separated names, or a preset, icd or piebench; by default what suits the benchmark and the model.
        data: COCO's captions as JSON, a CSV of image and caption, PIE-Bench's folder, or a CSV of COCO edits; without
            it, held-out scenes of the tiny world.
        images: Folder that the names in data are relative to; by default that of data.
        natural: Leave out PIE-Bench's artificial pictures, as the paper does.
        count: Pictures to measure on, from the first; by default all of data, or 128 scenes.
        guidance_scale: w of the guided decodings, 1 is unguided; by default the family's own.
        tau: Dynamic guidance guides at t <= tau T only; by default the family's own, and 0.8 in the reconstructions of
            `scenes`.
        grid: Settings to try, every combination, as in "tau=0.6,0.8 swap_tau=0.6,0.8"; guidance is w, tau, tau1 with
            tau2, or lo with hi; for edits there are the method's own options, and for all benchmarks the numbers of
            its constructor, as in "strength=0.3,0.5".
        seed: Of the random numbers; of `scenes`, which world the scenes come from.
        batch_size: Pictures at once, by default 16, of `scenes` 64.
        ddim: Measure DDIM-50 too, which takes most of the time of `scenes`.
        out: Folder of all results, by default outputs/eval-BENCHMARK, of `scenes` outputs/eval-inversion; what was
            measured before with the same settings and weights is reused.
    """
    from icd_lightning.evaluation.benchmark import Benchmark, Settings
    from icd_lightning.evaluation.decodings import parse_grid
    from icd_lightning.evaluation.methods import all_methods
    from icd_lightning.evaluation.suite import Suite

    usual, models = Benchmark.find(benchmark), Weights(**options).models()
    methods = all_methods(models.family) if method == "all" else names(method) or usual.methods
    settings = Settings(
        benchmark,
        methods=tuple(name for name in methods if ddim or name != "ddim"),
        metrics=names(metrics),
        data=Path(data) if data else None,
        images=Path(images) if images else None,
        natural=natural,
        count=count,
        guidance_scale=guidance_scale,
        tau=tau,
        grid=parse_grid(grid),
        seed=seed,
        batch_size=batch_size,
    )
    folder = Path(out or f"outputs/{usual.folder or f'eval-{benchmark}'}")
    check_folder(folder)
    for path in Suite(settings, models, folder).run():
        log.info("%s", path)


def names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",")) if text else None


def condense(*, source: str = "outputs", out: str = "notebooks/results") -> None:
    """Copy what the notebooks read of a folder of results: a few MB that git can keep.

    These are the summaries and the rows of each picture, the scalars of each training, and the few pictures that the
    notebooks show.

    Args:
        source: Folder with ablations/ (of `icd ablations`), eval-guidance/ and eval-generation/ (of `icd eval`), or
            some of them.
        out: Folder to copy to, under the same names.
    """
    from icd_lightning.evaluation.shipping import condense as copy

    for folder in copy(Path(source), Path(out)):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        log.info("%s  %.1f MB", folder, size / 1e6)
