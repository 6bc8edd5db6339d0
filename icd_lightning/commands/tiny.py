"""`icd demo`: the whole method on this machine; `icd tiny ...`: the family that ships, packed and measured."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

log = logging.getLogger(__name__)


def demo(
    *,
    out: str | None = None,
    conf: str = "conf",
    model: str = "tiny",
    train_count: PositiveInt = 4096,
    eval_count: PositiveInt = 64,
    steps: PositiveInt | None = None,
) -> None:
    """Write shards, measure the untrained students and DDIM-50, train both students, measure again, draw a report.

    What is already there is reused, so that a second call is quick and an interrupted one goes on.

    Args:
        out: folder of all results; by default outputs/demo, and of another model outputs/demo-NAME.
        conf: folder of the configuration files.
        model: tiny or tiny_flow, the shipped families, or the folder of another one of the picture world.
        train_count: pictures to train on.
        eval_count: held-out pictures to measure on.
        steps: training steps; by default what conf/experiment/demo.yaml says.
    """
    from icd_lightning.commands import fit
    from icd_lightning.commands.ablations import overlays_of, results_of
    from icd_lightning.commands.data import shapes
    from icd_lightning.models.family import Family
    from icd_lightning.tiny.demo import DemoStudy

    start = time.monotonic()
    root = results_of("demo", model, out)
    whole = not (root / "training").exists()  # a call that finds nothing done tells how long all of it takes
    files, family = fit.conf_files(conf, overlays_of(model, "experiment/demo")), Family(model)
    study = DemoStudy(root, eval_count, family)
    log.info("1/4 shards for %s", family.root)
    shapes(str(root / "shards" / "train"), count=train_count, seed=0)
    shapes(str(root / "shards" / "val"), count=128, seed=1)
    log.info("2/4 before training: DDIM-50 and the untrained students")
    before = study.measure_before()
    log.info("3/4 training both students")
    options = {
        "trainer.default_root_dir": root / "training",
        "data.init_args.urls": root / "shards" / "train",
        "model.init_args.family.model": model,
        "data.init_args.val_urls": root / "shards" / "val",
    }
    fit.train(files, options if steps is None else {**options, "trainer.max_steps": steps})
    log.info("4/4 after training, and the report")
    after = study.measure_after()
    study.report(before, after, seconds=time.monotonic() - start if whole else None)


def report(
    *,
    model: str = "tiny",
    count: int = 512,
    seed: int = 1_000_003,
    out: str | None = None,
    card: bool = False,
) -> None:
    """Measure a tiny family against its bars on held-out scenes; writes bars.json.

    Args:
        model: "tiny" or "tiny_flow" (shipped), or a folder, e.g. outputs/tiny-weights/model.
        count: scenes to measure on.
        seed: which world they come from; trainings used the seeds 0 to 6.
        out: folder for bars.json; by default outputs/tiny-report, and of another model outputs/tiny-report-NAME.
        card: also write the model card, README.md in the family's folder.
    """
    from icd_lightning.commands.ablations import results_of
    from icd_lightning.evaluation.report import Style, Table, print_tables
    from icd_lightning.files import write_json
    from icd_lightning.models.family import Family
    from icd_lightning.tiny.bars import measure_family
    from icd_lightning.tiny.card import write_card
    from icd_lightning.tiny.scenes import check_held_out

    if count < 1:
        raise ValueError(f"count {count} must be 1 or more")
    check_held_out(seed)
    family, file = Family(model), results_of("tiny-report", model, out) / "bars.json"
    bars = measure_family(family, count=count, seed=seed)
    rules = [("", "") if bar.limit is None else (f">= {bar.limit:g}", "ok" if bar.passed else "MISSED") for bar in bars]
    rows = tuple((bar.name, bar.value, *rule) for bar, rule in zip(bars, rules, strict=True))
    title, header = f"{model} on {count} held-out scenes (seed {seed})", ("what", "measured", "bar", "")
    print_tables([Table(title, "", header, rows, styles={"measured": Style(4)})])
    write_json(file, {"model": model, "count": count, "seed": seed, "bars": [asdict(bar) for bar in bars]})
    log.info("%s", file)
    if card:
        log.info("%s", write_card(family.root, bars, count=count, seed=seed))


def jumps(
    *,
    out: str | None = None,
    conf: str = "conf",
    model: str = "tiny",
    train_data: str = "data/shapes/train",
    val_data: str = "data/shapes/val",
    steps: PositiveInt | None = None,
    count: int = 256,
) -> None:
    """Train students of 1, 2, 3 and 4 jumps each way and measure them beside the same jumps untrained.

    Stopped and called again it goes on. Writes jumps.md, report.html and report.png.

    Args:
        out: folder of all results; by default outputs/jumps, and of another model outputs/jumps-NAME.
        conf: folder of the configuration files.
        model: tiny or tiny_flow, the shipped families, or the folder of another one of the picture world.
        train_data: shards to train on.
        val_data: shards to validate on.
        steps: steps of each training; by default what conf/experiment/tiny.yaml says.
        count: held-out pictures to measure on.
    """
    from icd_lightning.commands.ablations import overlays_of, results_of, train
    from icd_lightning.commands.fit import conf_files
    from icd_lightning.commands.weights import Weights
    from icd_lightning.diffusion import Boundaries
    from icd_lightning.evaluation.methods import teacher_hash
    from icd_lightning.evaluation.report import print_tables
    from icd_lightning.tiny.jumps import NUMBERS, measure_jumps, measured_as, write_jumps

    root, models, settings = results_of("jumps", model, out), Weights(model).models(), measured_as(count)
    files, frozen = conf_files(conf, overlays_of(model, "experiment/tiny")), teacher_hash(models.family)
    options = {"model.init_args.family.model": model, "data.init_args.urls": train_data}
    options |= {"data.init_args.val_urls": val_data, "trainer.max_steps": steps}
    trainings = {}
    for number in NUMBERS:
        ends = list(Boundaries.uniform(number).boundary_timesteps)
        given = {**options, "model.init_args.boundaries.boundary_timesteps": ends}
        trainings[number] = train(root, str(number), files, given, frozen)
    table, paths = write_jumps(measure_jumps(trainings, models, settings, root), root)
    print_tables([table])
    for path in paths:
        log.info("%s", path)


def package(
    *,
    model: Literal["tiny", "tiny_flow"] = "tiny",
    source: str | None = None,
    out: str | None = None,
    max_megabytes: float = 30.0,
) -> None:
    """Turn the parts that `make tiny-weights` trained into the family that ships: half precision, with their records.

    Args:
        model: which one; tiny_flow is of `make tiny-flow-weights`.
        source: folder of the trainings; by default where make leaves them.
        out: folder of the family; by default inside the package.
        max_megabytes: refuse to write more than this.
    """
    from icd_lightning.models.sources import shipped
    from icd_lightning.tiny.packaging import package_family

    trainings = Path(source or f"outputs/{model.replace('_', '-')}-weights")
    folder = shipped(model) if out is None else Path(out)
    log.info("%s: %.1f MB", folder, package_family(trainings, folder, max_megabytes, model))
