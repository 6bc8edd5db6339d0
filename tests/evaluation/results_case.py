"""A folder of results as `icd ablations` and `icd eval` write it, with figures drawn from a generator, in a second."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from icd_lightning.data.images import save_png
from icd_lightning.evaluation.ablations.study import AblationStudy, Comparison, read_ablations
from icd_lightning.evaluation.ablations.tables import write_study
from icd_lightning.evaluation.benchmarks.guidance import GUIDANCES, TURN_ON
from icd_lightning.evaluation.curves import write_scalars
from icd_lightning.evaluation.report import Style
from icd_lightning.evaluation.results import CONFIG, MEANS, ROWS, Results, places, slug
from icd_lightning.evaluation.scoring import RECORDED
from icd_lightning.files import write_json, write_whole
from icd_lightning.tiny.scenes import HELD_OUT_SEED

CONF = Path(__file__).parents[2] / "conf"
PICTURES = 24
LEVELS = {"A": 20.0, "B": 20.8, "C": 21.6, "E": 19.0, "F": 22.4, "G": 24.0}
GUIDED = {"w 1": 0.0, "w 3": -6.0, "w 3, tau 0.7": -3.0, "w 5": -8.0, "w 5, tau 0.7": -4.5}
"""Decodings, and what each loses in PSNR."""
STYLES = {**RECORDED, "psnr": Style(2, "max"), "ssim": Style(None, "max"), "tiny-agreement": Style(1, "max", 100.0)}


def options_of(decoding: str) -> dict[str, float]:
    """Of a decoding that is named by its options."""
    if decoding.startswith("encoder"):
        return {}
    return {name: float(value) for name, value in (pair.split(" ") for pair in decoding.split(", "))}


def write_results(name: str, folder: Path, means: Mapping[str, Mapping[str, float]], *, sets=None, seed=0) -> Results:
    """A run: means[decoding][column], pictures spread around them, those of hard ones low in every decoding."""
    generator = np.random.default_rng(seed)
    hard = np.random.default_rng(1).normal(0, 1, PICTURES)
    rows = []
    for decoding, columns in means.items():
        for i in range(PICTURES):
            key = f"scene-{HELD_OUT_SEED}-{i:05d}"
            image = f"images/{slug(decoding)}/{key}.png"
            values = {
                column: mean * (1 + 0.08 * hard[i] + 0.01 * generator.normal()) for column, mean in columns.items()
            }
            about = {"key": key, "decoding": decoding, "kind": "", "image": image}
            rows.append({**about, "nfe": 8, "seconds": 0.1, **values})
            if decoding == "w 1":
                save_png(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8), folder / image, about={})
    options = {decoding: options_of(decoding) for decoding in means}
    frame = pd.DataFrame(rows)
    results = Results(name, frame, sets or {}, folder, options, STYLES)
    write_whole(folder / ROWS, frame.to_parquet)
    write_json(folder / MEANS, results.as_dict())
    columns = {column: style._asdict() for column, style in STYLES.items()}
    write_json(folder / CONFIG, {"run": name, "options": options, "columns": columns})
    return results


def back(level: float, decodings=GUIDED) -> dict[str, dict[str, float]]:
    """What comes back, by decoding, at this PSNR where it is unguided."""
    return {
        name: {"psnr": level + lost, "ssim": 0.8, "latent_mse": 10 ** (-(level + lost) / 20), "nll": 1.41}
        for name, lost in decodings.items()
    }


def write_ablations(root: Path, seeds=(0, 1)) -> AblationStudy:
    """outputs/ablations: runs, trainings with their logs, table2.json."""
    runs, trainings = {}, {}
    for letter, level in LEVELS.items():
        decodings = GUIDED if letter in "CFG" else {"w 1": 0.0}
        for seed in seeds:
            name = f"{letter}-{seed}"
            folder = root / "runs" / name / "icd-1a2b3c4d"
            runs[name] = write_results("icd", folder, back(level, decodings), seed=seed)
            trainings[name] = write_log(root / "trainings" / f"{name}-9f8e7d6c", level, letter)
    for n in (2, 3, 4):
        name = f"untrained-{n}"
        runs[name] = write_results("untrained", root / "runs" / name / "untrained-0", back(14.0 + n))
    runs["ddim"] = write_results("ddim", root / "runs" / "ddim" / "ddim-0", back(27.0))
    study = AblationStudy(read_ablations(CONF / "ablation"), (3.0, 5.0), seeds, runs, trainings)
    write_study(study, root, {"model": "tiny", "pictures": PICTURES})
    return study


def by_rows(comparisons) -> dict[str, Comparison]:
    """By their letters."""
    return {one.worse.name + one.better.name: one for one in comparisons}


def write_log(folder: Path, level: float, letter: str) -> Path:
    """A training's scalars; of losses, those that the row has."""
    steps = list(range(10, 401, 10))
    rising = [level * (1 - 0.5 * float(np.exp(-step / 80))) for step in steps]
    names = ["reverse_cd", *(["forward_cd"] if letter != "E" else [])]
    names += [
        *(["forward_preservation"] if letter in "EFG" else []),
        *(["reverse_preservation"] if letter == "G" else []),
    ]
    losses = {f"val/{name}": (steps, [1 / value for value in rising]) for name in names}
    mse = (steps, [10 ** (-value / 20) for value in rising])
    write_scalars(folder, {**losses, "reconstruction/psnr": (steps, rising), "reconstruction/latent_mse": mse})
    return folder


def write_guidance(root: Path) -> dict[str, Results]:
    """outputs/eval-guidance: both ends guided, and the thresholds of Fig. 4."""
    both = {
        f"encoder {e}, decoder {d}": {"psnr": 20.0, "latent_mse": 0.1 * (1 + abs(i - j)), "nll": 1.40 + 0.01 * i}
        for i, e in enumerate(GUIDANCES)
        for j, d in enumerate(GUIDANCES)
    }
    distances = {"tiny-fd": {name: 100 * values["latent_mse"] for name, values in both.items()}}
    thresholds = {f"tau {tau:g}": {"psnr": 20.0, "latent_mse": 0.05 + 0.3 * tau**3} for tau in TURN_ON}
    results = {
        "ddim, both ways": write_results("ddim", root / "ddim-0", both, sets=distances),
        "icd": write_results("icd", root / "icd-1", thresholds),
        "ddim": write_results("ddim", root / "ddim-1", thresholds),
    }
    return _summary(root / "guidance.json", results)


def write_generation(root: Path) -> dict[str, Results]:
    """outputs/eval-generation over tau1 and tau2: quality of what is made, error of what comes back."""
    taus = [(a, b) for a in (0.4, 0.7, 1.0) for b in (0.4, 0.7, 1.0) if a <= b]
    made, came_back = {"w 1": {"tiny-agreement": 0.6}}, {"w 1": {"latent_mse": 0.05}}
    for a, b in taus:
        made[f"tau1 {a:g}, tau2 {b:g}"] = {"tiny-agreement": 0.6 + 0.3 * (a + b) / 2}
        came_back[f"tau1 {a:g}, tau2 {b:g}"] = {"latent_mse": 0.05 + 0.2 * (a * b)}
    results = {
        "icd": write_results("icd", root / "icd-1", made),
        "icd, to noise and back": write_results("icd", root / "icd-2", came_back),
    }
    return _summary(root / "generation.json", results)


def _summary(file: Path, results: dict[str, Results]) -> dict[str, Results]:
    write_json(file, {"runs": places({name: r.folder for name, r in results.items()}, file.parent)})
    return {name: replace(r, name=name) for name, r in results.items()}


def write_outputs(root: Path) -> Path:
    """All three."""
    write_ablations(root / "ablations")
    write_guidance(root / "eval-guidance")
    write_generation(root / "eval-generation")
    return root
