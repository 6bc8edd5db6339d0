"""`icd ablations`: Table 2 from nothing: train what must be trained, measure it, judge the paper's orderings."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from icd_lightning.commands.evaluate import names
from icd_lightning.commands.weights import Weights
from icd_lightning.editing.limits import check_guidance_scale, check_seed
from icd_lightning.files import check_folder

log = logging.getLogger(__name__)


def ablations(
    *,
    out: str | None = None,
    conf: str = "conf",
    overlays: str | None = None,
    seeds: str = "0",
    model: str = "tiny",
    guided_unet: str | None = None,
    train_data: str = "data/shapes/train",
    val_data: str = "data/shapes/val",
    steps: PositiveInt | None = None,
    data: str | None = None,
    images: str | None = None,
    count: int | None = 128,
    guidance_scales: str = "3,5",
    metrics: str | None = None,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Train and measure the paper's ablations A to K; write Table 2 with a verdict on each of its orderings.

    A, B, C, E, F and G are trained, each once a seed; H to K decode the students of C, F and G with guidance. Stopped
    and called again it goes on: trainings from their last checkpoint, measurements from the last batch of pictures.

    Args:
        out: Folder of all results: table2.md, table2.json, report.html and report.png, trainings/ and runs/; by default
            outputs/ablations, and of another model outputs/ablations-NAME.
        conf: Folder of the configuration files.
        overlays: Comma-separated files in it, of which each training is composed, before conf/ablation/*.yaml; by
            default base, model/tiny and experiment/ablations, and model/tiny_flow for that model.
        seeds: Comma-separated seeds of the trainings, e.g. 0,1,2.
        model: "tiny" (shipped), or another family.
        guided_unet: Its guidance-distilled UNet, a folder or a file; by default the model's own.
        train_data: Shards to train on.
        val_data: Shards to validate on.
        steps: Training steps; by default what the overlays say.
        data: COCO's captions as JSON, or a CSV of image and caption, to measure on; by default held-out scenes.
        images: Folder that the names in data are relative to.
        count: Pictures to measure on.
        guidance_scales: Comma-separated w of the guided rows; the paper's is 8, for SD1.5.
        metrics: Comma-separated names; by default what suits the model.
        batch_size: Pictures at once, when measuring.
        device: auto, cpu, cuda ... to measure on; where to train is the overlays' matter.
    """
    numbers = _numbers("seeds", seeds, lambda text: check_seed(int(text)))
    scales = _numbers("guidance_scales", guidance_scales, lambda text: check_guidance_scale(float(text)))

    import torch

    from icd_lightning.commands.fit import conf_files
    from icd_lightning.evaluation.ablations.study import AblationStudy, measure_study, read_ablations
    from icd_lightning.evaluation.benchmark import Settings
    from icd_lightning.evaluation.benchmarks.inversion import TO_NOISE_AND_BACK
    from icd_lightning.evaluation.methods import teacher_hash
    from icd_lightning.evaluation.suite import Suite

    if torch.cuda.device_count() > 1 and "RANK" not in os.environ:  # one training after another starts ranks anew
        raise ValueError(
            "there are several GPUs: start it by torchrun --nproc_per_node N --no-python .venv/bin/icd ablations, or "
            "let it see one by CUDA_VISIBLE_DEVICES=0"
        )
    places = {name: Path(path) for name, path in (("data", data), ("images", images)) if path}
    inversion = Settings("inversion", metrics=names(metrics), count=count, batch_size=batch_size, **places)
    models, root = Weights(model, guided_unet, device=device).models(), results_of("ablations", model, out)
    Suite(inversion, models, root).scoring(TO_NOISE_AND_BACK)  # refuses before hours of training
    rows, frozen, trainings = read_ablations(Path(conf) / "ablation"), teacher_hash(models.family), {}
    options = {"model.init_args.family.model": model, "model.init_args.family.guided_unet": guided_unet}
    options |= {"data.init_args.urls": train_data, "data.init_args.val_urls": val_data, "trainer.max_steps": steps}
    composed = overlays.split(",") if overlays else overlays_of(model, "experiment/ablations")
    for seed in numbers:  # seed by seed: whole ones come first
        seeded = options | dict.fromkeys(("seed_everything", "model.init_args.seed", "data.init_args.seed"), seed)
        for letter in dict.fromkeys(row.students for row in rows.values()):
            files = conf_files(conf, (*composed, f"ablation/{letter}"))
            trainings[f"{letter}-{seed}"] = train(root, f"{letter}-{seed}", files, seeded, frozen)
    study = measure_study(AblationStudy(rows, scales, numbers, {}, trainings), models, inversion, root)
    facts = {"model": model, "weights": frozen[:8], "overlays": ",".join(composed), "seeds": seeds, "pictures": count}
    facts |= {name: str(path.resolve()) for name, path in places.items()}
    report(study, root, facts)


def results_of(command: str, model: str, out: str | None) -> Path:
    """The folder of a command's results, each model's its own; OSError where none can be made."""
    folder = Path(out or ("outputs/" + command + ("" if model == "tiny" else f"-{Path(model).name}")))
    check_folder(folder)
    return folder


def overlays_of(model: str, experiment: str) -> list[str]:
    """What a training in the picture world is composed of."""
    from icd_lightning.models.released import SHIPPED

    return ["base", "model/tiny", *(f"model/{name}" for name in SHIPPED[1:] if name == model), experiment]


def train(root: Path, name: str, files: Sequence[Path], options: dict[str, object], weights: str) -> Path:
    """Train both students, if that is not done; return their folder, named after all that the training depends on."""
    import hashlib
    import json

    from icd_lightning.commands import fit
    from icd_lightning.files import as_seen_here
    from icd_lightning.models.student_file import WEIGHTS_NAME
    from icd_lightning.models.students import DIRECTIONS

    given = {key: as_seen_here(value) for key, value in options.items() if value is not None}
    depends = [weights, given, *(file.read_text() for file in files)]
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()
    folder = root / "trainings" / f"{name}-{digest[:8]}"
    if all((folder / direction / WEIGHTS_NAME).is_file() for direction in DIRECTIONS):  # written at a training's end
        log.info("%s: trained before", folder)
        return folder
    log.info("%s: training", folder)
    fit.train(files, {**given, "trainer.default_root_dir": folder})
    return folder


def report(study: Any, root: Path, facts: dict[str, object]) -> None:
    from icd_lightning.evaluation.ablations.tables import table_2, verdict_table, write_study
    from icd_lightning.evaluation.report import print_tables

    print_tables([*table_2(study), verdict_table(study)])
    for path in write_study(study, root, facts):
        log.info("%s", path)


def _numbers(name: str, text: str, read: Callable[[str], Any]) -> tuple[Any, ...]:
    try:
        numbers = tuple(map(read, text.split(",")))
    except ValueError as error:
        raise ValueError(f"{name} {text!r} must be numbers separated by commas ({error})") from None
    if len(set(numbers)) < len(numbers):  # a training counted twice would agree with itself
        raise ValueError(f"{name} {text} has a number twice: leave one out")
    return numbers
