"""Table 2 (arXiv:2406.14539): what more segments, the preservation losses and dynamic guidance each add.

The rows are conf/ablation/*.yaml. Rows that differ in their decoding only share their students, so that six trainings
(A, B, C, E, F, G) give ten rows. The orderings that the paper reports are judged picture by picture, not assumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from icd_lightning.evaluation.benchmark import Settings
from icd_lightning.evaluation.benchmarks.inversion import TO_NOISE_AND_BACK
from icd_lightning.evaluation.decodings import UNGUIDED, Decoding, steps
from icd_lightning.evaluation.examples import Example, read_data
from icd_lightning.evaluation.methods import Models
from icd_lightning.evaluation.runs import Results, places, read_runs, read_summary
from icd_lightning.evaluation.statistics import Verdict, compare
from icd_lightning.evaluation.suite import Suite

LETTERS = "ABCEFGHIJK"
ORDERINGS = {False: "ABCFG", True: "HIJK"}
"""Unguided and guided rows that the paper finds in ascending order of PSNR."""
TABLE_2_JSON = "table2.json"
"""In a study's folder: its figures, and where the runs lie that they were made of."""
TAU = 0.7
"""Of dynamic guidance in the paper's Table 2, for DDIM too."""


@dataclass(frozen=True)
class Ablation:
    """A row: whose students, and how they are decoded."""

    letter: str
    students: str
    tau: float | None  # None: unguided
    boundaries: tuple[int, ...]

    @property
    def guided(self) -> bool:
        return self.tau is not None

    def decoding(self, guidance_scale: float) -> str:
        """The name of its decoding at this w."""
        return UNGUIDED.name if self.tau is None else Decoding.step(guidance_scale, self.tau).name


def read_ablations(folder: Path) -> dict[str, Ablation]:
    """The rows by letter, from conf/ablation; those equal but for their decoding share the students of the first."""
    trainings: dict[str, str] = {}
    ablations = {}
    for letter in LETTERS:
        file = folder / f"{letter}.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"no ablation {letter}: there is no {file}; run this in the repository")
        changes = dict(yaml.safe_load(file.read_text())["model"]["init_args"])
        decoding = changes.pop("decoding")
        students = trainings.setdefault(json.dumps(changes, sort_keys=True), letter)
        tau = None if decoding.get("guidance_scale") == 1.0 else float(decoding["tau"])
        ablations[letter] = Ablation(letter, students, tau, tuple(changes["boundaries"]["boundary_timesteps"]))
    return ablations


@dataclass(frozen=True)
class AblationStudy:
    """All that was measured: students[letter][seed], untrained[number of segments] and DDIM, each by decoding.

    `trainings` are the students' folders with their logs.
    """

    ablations: Mapping[str, Ablation]
    guidance_scales: Sequence[float]
    seeds: Sequence[int]
    students: Mapping[str, Mapping[int, Results]]
    untrained: Mapping[int, Results]
    ddim: Results
    trainings: Mapping[str, Mapping[int, Path]] = field(default_factory=dict)

    @property
    def runs(self) -> dict[str, Results]:
        """Every measurement, by its folder's name."""
        students = {f"{x}-{seed}": r for x, results in self.students.items() for seed, r in results.items()}
        return {**students, **{f"untrained-{n}": r for n, r in self.untrained.items()}, "ddim": self.ddim}

    def record(self, root: Path) -> dict[str, Any]:
        """Fit for JSON: all that `read_study` needs to put the study together again from its folder."""
        trainings = {f"{x}-{seed}": path for x, found in self.trainings.items() for seed, path in found.items()}
        return {
            "ablations": [asdict(ablation) for ablation in self.ablations.values()],
            "guidance_scales": list(self.guidance_scales),
            "seeds": list(self.seeds),
            "runs": places({name: results.folder for name, results in self.runs.items()}, root),
            "trainings": places(trainings, root),
        }

    def values(self, letter: str, guidance_scale: float, column: str = "psnr") -> np.ndarray:
        """A column of a row, (seeds, pictures)."""
        ablation = self.ablations[letter]
        runs = self.students[ablation.students]
        return np.array([runs[seed].values(column, ablation.decoding(guidance_scale)) for seed in self.seeds])

    def verdicts(self) -> list[tuple[str, Verdict]]:
        """On each neighbouring pair of the paper's orderings, with the decoding's name."""
        found = []
        for guided, letters in ORDERINGS.items():
            for w in self.guidance_scales if guided else (1.0,):
                values = {letter: list(self.values(letter, w)) for letter in letters}
                name = f"guided, w {w:g}" if guided else "unguided"
                found += [(name, compare(a, b, values)) for a, b in pairwise(letters)]
        return found

    @property
    def columns(self) -> list[str]:
        """Figures of every row that say how near the pictures came back."""
        return [name for name in self.ddim.columns if name not in ("nfe", "seconds", "nll")]


@dataclass(frozen=True)
class AblationSettings:
    """What to measure a study on, `settings` of the benchmark inversion, and where to write it."""

    root: Path
    models: Models
    guidance_scales: tuple[float, ...] = (3.0, 5.0)
    settings: Settings = field(default=Settings("inversion", count=128))

    def measure(self, name: str, method: str, *, guided: bool, **students: str) -> Results:
        """A method to noise and back, unguided and, if asked for, at every w throughout and dynamically."""
        settings, models = replace(self.settings, methods=(method,)), replace(self.models, **students)
        scales = self.guidance_scales if guided else ()
        decodings = [UNGUIDED, *(one for w in scales for one in steps(w, (1.0, TAU))[1:])]
        suite = Suite(settings, models, self.root / "runs" / name)
        (results,) = suite.perform(replace(TO_NOISE_AND_BACK, decodings=lambda *_: decodings))["inversion"]
        return results


def measure_study(
    settings: AblationSettings, ablations: Mapping[str, Ablation], students: Mapping[str, Mapping[int, Path]]
) -> AblationStudy:
    """Measure the trained students[letter][seed] (folders), the untrained ones of A, B and C, and DDIM-50."""
    guided = {ablation.students for ablation in ablations.values() if ablation.guided}
    measured = {
        letter: {
            seed: settings.measure(
                f"{letter}-{seed}",
                "icd",
                guided=letter in guided,
                **{part: str(folder / part) for part in ("forward", "reverse")},
            )
            for seed, folder in folders.items()
        }
        for letter, folders in students.items()
    }
    untrained = {
        len(ends): settings.measure(
            f"untrained-{len(ends)}", "untrained", guided=len(ends) == 4, boundaries=",".join(map(str, ends))
        )
        for ends in dict.fromkeys(ablation.boundaries for ablation in ablations.values())
    }
    ddim = settings.measure("ddim", "ddim", guided=True)
    seeds = list(next(iter(students.values())))
    return AblationStudy(ablations, settings.guidance_scales, seeds, measured, untrained, ddim, students)


# --- what was written, read back -------------------------------------------------------------------------------------


def read_study(folder: Path) -> AblationStudy:
    """The study that `icd ablations` wrote to its folder, or the part of it that ships."""
    record, runs = read_summary(folder / TABLE_2_JSON), read_runs(folder / TABLE_2_JSON)
    rows = [Ablation(**{**row, "boundaries": tuple(row["boundaries"])}) for row in record["ablations"]]
    letters, seeds = dict.fromkeys(row.students for row in rows), record["seeds"]
    untrained = {int(name.removeprefix("untrained-")): runs[name] for name in runs if name.startswith("untrained-")}
    return AblationStudy(
        {row.letter: row for row in rows},
        record["guidance_scales"],
        seeds,
        {letter: {seed: runs[f"{letter}-{seed}"] for seed in seeds} for letter in letters},
        untrained,
        runs["ddim"],
        {letter: {seed: folder / record["trainings"][f"{letter}-{seed}"] for seed in seeds} for letter in letters},
    )


def read_examples(folder: Path) -> dict[str, Example]:
    """The pictures that a study was measured on, by key: of files, those that its command was given."""
    facts = read_summary(folder / TABLE_2_JSON)["facts"]
    data, images = (Path(facts[name]) if name in facts else None for name in ("data", "images"))
    return {example.key: example for example in read_data(data, images, facts["pictures"]).examples}
