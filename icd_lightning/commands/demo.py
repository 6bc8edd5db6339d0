"""`icd demo`: the whole method on this machine, with a report."""

from __future__ import annotations

import logging
import time
from pathlib import Path

log = logging.getLogger(__name__)

CONFIGS = ("base.yaml", "model/tiny.yaml", "experiment/demo.yaml")


def demo(
    *,
    out: str = "outputs/demo",
    conf: str = "conf",
    model: str = "tiny",
    train_count: int = 4096,
    eval_count: int = 64,
    steps: int | None = None,
) -> None:
    """Write shards, measure the untrained students and DDIM-50, train both students, measure again, draw a report.

    What is already there is reused, so that a second call is quick and an interrupted one goes on.

    Args:
        out: folder of all results.
        conf: folder of the configuration files.
        model: the shipped family, or the folder of another one of the picture world.
        train_count: pictures to train on.
        eval_count: held-out pictures to measure on.
        steps: training steps; by default what conf/experiment/demo.yaml says.
    """
    from icd_lightning.commands import fit
    from icd_lightning.commands.data import shapes
    from icd_lightning.models.family import Family
    from icd_lightning.tiny.demo import DemoStudy

    start, root = time.monotonic(), Path(out)
    whole = not (root / "training").exists()  # a call that finds nothing done tells how long all of it takes
    missing = [str(Path(conf) / name) for name in CONFIGS if not (Path(conf) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"no configuration {missing[0]}: run this in the repository, or name its conf/ by --conf"
        )
    log.info("1/4 shards")
    shapes(str(root / "shards" / "train"), count=train_count, seed=0)
    shapes(str(root / "shards" / "val"), count=128, seed=1)
    log.info("2/4 before training: DDIM-50 and the untrained students")
    study = DemoStudy(root, eval_count, Family(model))
    before = study.measure_before()
    log.info("3/4 training both students")
    configs = [word for name in CONFIGS for word in ("--config", str(Path(conf) / name))]
    overrides = {
        "trainer.default_root_dir": root / "training",
        "data.init_args.urls": root / "shards" / "train",
        "model.init_args.family.model": model,
        "data.init_args.val_urls": root / "shards" / "val",
        **({} if steps is None else {"trainer.max_steps": steps}),
    }
    fit.run(["fit", *configs, *(f"--{key}={value}" for key, value in overrides.items())])
    log.info("4/4 after training, and the report")
    after = study.measure_after()
    study.report(before, after, seconds=time.monotonic() - start if whole else None)
