"""The study of ablations: its rows, two of them compared, its runs, and how it is measured and read back.

The rows are conf/ablation/*.yaml. Rows that differ in their decoding only share their students, so that six trainings
(A, B, C, E, F, G) give ten rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from icd_lightning.evaluation.benchmark import Settings
from icd_lightning.evaluation.benchmarks.inversion import TABLE_2, TO_NOISE_AND_BACK
from icd_lightning.evaluation.decodings import UNGUIDED, Decoding, steps
from icd_lightning.evaluation.examples import Example, read_data
from icd_lightning.evaluation.methods import Models
from icd_lightning.evaluation.results import AGAIN, Results, named_folders, read_runs, read_summary
from icd_lightning.evaluation.statistics import Estimate, bootstrap, bootstrap_trainings
from icd_lightning.evaluation.suite import Suite
from icd_lightning.files import read_yaml

ROWS = {  # whose students, and what they have that the row before in the ordering has not; there is no D
    "A": ("fCD2, CD2", ""),
    "B": ("fCD3, CD3", "a third segment"),
    "C": ("fCD4, CD4", "a fourth segment"),
    "E": ("CD4, fCD4 by L_f alone", ""),
    "F": ("C + L_f", "L_f"),
    "G": ("F + L_r", "L_r"),
    "H": ("C", ""),
    "I": ("H + d.CFG", "dynamic guidance"),
    "J": ("I + L_f", "L_f"),
    "K": ("J + L_r", "L_r"),
}
UNGUIDED_ROWS = "ABCEFG"
ORDERINGS = {False: "ABCFG", True: "HIJK"}
"""Unguided and guided rows that the paper finds in ascending order of PSNR."""
TABLE_2_JSON = "table2.json"
"""In a study's folder: its figures, and where the runs lie that they were made of."""
TAU = 0.7  # of dynamic guidance in the paper's Table 2, for DDIM too


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
        return UNGUIDED.name if self.tau is None else Decoding.step(guidance_scale, self.tau).name


def read_ablations(folder: Path) -> dict[str, Ablation]:
    """The rows by letter, from conf/ablation; those equal but for their decoding share the students of the first."""
    trainings: dict[str, str] = {}
    ablations = {}
    for letter in ROWS:
        file = folder / f"{letter}.yaml"
        if not file.is_file():
            raise FileNotFoundError(f"no ablation {letter}: there is no {file}; run this in the repository")
        content = read_yaml(file)
        try:
            changes = dict(content["model"]["init_args"])
            decoding, ends = changes.pop("decoding"), tuple(changes["boundaries"]["boundary_timesteps"])
            tau = None if decoding.get("guidance_scale") == 1.0 else float(decoding["tau"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file} must say boundaries and decoding of model.init_args ({error!r})") from error
        students = trainings.setdefault(json.dumps(changes, sort_keys=True), letter)
        ablations[letter] = Ablation(letter, students, tau, ends)
    return ablations


@dataclass(frozen=True)
class Row:
    """A run for each training, under one decoding; `part` is what it adds to the row before it in an ordering."""

    name: str
    description: str
    decoding: str
    runs: Sequence[Results]
    part: str = ""

    def values(self, column: str = "psnr") -> np.ndarray:
        """A column, (trainings, pictures)."""
        return np.array([run.values(column, self.decoding) for run in self.runs])

    def pictures(self, column: str = "psnr") -> np.ndarray:
        """A column's means over trainings, (pictures,)."""
        return self.values(column).mean(0)

    def mean(self, column: str = "psnr") -> Estimate:
        """A column's mean over all, its interval as that of a `Comparison`."""
        return bootstrap_trainings(self.values(column))


class Comparison:
    """Whether `better` really is above `worse` in PSNR, over the same pictures; `where` says how both are decoded.

    The difference's interval is over resampled pictures and, with MIN_SEEDS or more, over trainings as well; with fewer
    the verdict is of these trainings only: found, reversed, or undecided where the interval holds 0. `papers` is the
    paper's difference, `gain` (pictures,) that of each picture, by `keys`, as a mean over trainings.
    """

    def __init__(self, worse: Row, better: Row, where: str = "") -> None:
        self.worse, self.better, self.where = worse, better, where
        self.papers = TABLE_2[better.name][2] - TABLE_2[worse.name][2]
        differences = better.values() - worse.values()
        self.difference = bootstrap_trainings(differences)
        self.verdict = "found" if self.difference.low > 0 else "reversed" if self.difference.high < 0 else "undecided"
        self.seeds_agreeing = int((differences.mean(1) > 0).sum())
        self.gain = better.pictures() - worse.pictures()
        self.keys: list[str] = worse.runs[0].of(worse.decoding).key.tolist()

    def by_hardness(self, reference: np.ndarray, groups: int = 4) -> list[tuple[float, Estimate]]:
        """Mean gain of equal groups of pictures, from those whose `reference` (pictures,) is least, with its mean.

        The reference must not share noise with either side, as a row's own PSNR would: that alone would make what is
        low before gain most.
        """
        parts = np.array_split(np.argsort(reference, kind="stable"), min(groups, len(reference)))
        return [(float(reference[part].mean()), bootstrap(self.gain[part])) for part in parts]


@dataclass(frozen=True)
class AblationStudy:
    """All that was measured: `runs` of students ("A-0", of A with seed 0), "untrained-4" (segments) and "ddim"."""

    ablations: Mapping[str, Ablation]
    guidance_scales: Sequence[float]
    seeds: Sequence[int]
    runs: Mapping[str, Results]
    trainings: Mapping[str, Path] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Figures of every row that say how near the pictures came back."""
        left_out = ("nfe", "seconds", "nll", *self.runs["ddim"].set_scores)
        return [name for name in self.runs["ddim"].columns if name not in left_out]

    def row(self, letter: str, guidance_scale: float = 1.0) -> Row:
        ablation = self.ablations[letter]
        runs = [self.runs[f"{ablation.students}-{seed}"] for seed in self.seeds]
        description, part = ROWS[letter]
        return Row(letter, description, ablation.decoding(guidance_scale), runs, part)

    def untrained(self, segments: int, decoding: str = UNGUIDED.name) -> Row:
        """The teacher through the jumps of students with this many segments."""
        label = f"{segments} + {segments} jumps" + (" + d.CFG" if "tau" in decoding else "")
        return Row("untrained", label, decoding, [self.runs[f"untrained-{segments}"]])

    def rows(self, w: float | None) -> list[Row]:
        """Of Table 2: the teacher, the untrained students and the ablations, guided at this w, or unguided."""
        segments = sorted({len(row.boundaries) for row in self.ablations.values()})
        if w is None:
            rows = [Row("DDIM-50", "teacher", UNGUIDED.name, [self.runs["ddim"]])]
            rows += [self.untrained(count) for count in segments]
        else:
            throughout, dynamic = (Decoding.step(w, tau).name for tau in (1.0, TAU))
            rows = [Row("DDIM-50, guided", "teacher", throughout, [self.runs["ddim"]])]
            rows += [Row("DDIM-50 + d.CFG", "teacher", dynamic, [self.runs["ddim"]])]
            rows += [self.untrained(segments[-1], decoding) for decoding in (throughout, dynamic)]
        chosen = [row.letter for row in self.ablations.values() if row.guided == (w is not None)]
        return [*rows, *(self.row(letter, w or 1.0) for letter in chosen)]

    def comparisons(self, w: float | None = None) -> list[Comparison]:
        """Of neighbouring rows in the paper's ordering, guided at this w, or unguided."""
        rows = [self.row(letter, w or 1.0) for letter in ORDERINGS[w is not None]]
        where = "unguided" if w is None else f"guided, w {w:g}"
        return [Comparison(worse, better, where) for worse, better in pairwise(rows)]

    def verdicts(self) -> list[Comparison]:
        return [one for w in (None, *self.guidance_scales) for one in self.comparisons(w)]


def read_study(folder: Path) -> AblationStudy:
    """The study that `icd ablations` wrote to its folder, or the part of it that ships."""
    file = folder / TABLE_2_JSON
    record, runs, trainings = read_summary(file), read_runs(file), named_folders(file, "trainings")
    try:
        told = [Ablation(**{**row, "boundaries": tuple(row["boundaries"])}) for row in record["ablations"]]
        rows = {row.letter: row for row in told}
        study = AblationStudy(rows, record["guidance_scales"], record["seeds"], runs, trainings)
        scales = {True: study.guidance_scales, False: (1.0,)}
        every = [study.row(letter, w) for letter in ROWS for w in scales[rows[letter].guided]]
        np.array([row.values() for row in every])[:, 0, 0]  # all are there, and of equal sizes
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} does not hold what a study leaves ({error!r}): {AGAIN}") from error
    return study


def read_examples(folder: Path) -> dict[str, Example]:
    """The pictures that a study was measured on, by key: of files, those that its command was given."""
    facts = read_summary(folder / TABLE_2_JSON)["facts"]
    data, images = (Path(facts[name]) if name in facts else None for name in ("data", "images"))
    settings = Settings("inversion", data=data, images=images, count=facts["pictures"])
    return {example.key: example for example in read_data(settings).examples}


def measure_study(study: AblationStudy, models: Models, settings: Settings, root: Path) -> AblationStudy:
    """The study with its runs, to noise and back: the trained students, the untrained ones of A, B and C, and DDIM-50.

    What is decoded with guidance is so at every w, throughout and dynamically.
    """
    every = [one for w in study.guidance_scales for one in steps(w, (1.0, TAU))[1:]]

    def measured(name: str, method: str, *, guided: bool, **students: str) -> Results:
        decodings = [UNGUIDED, *(every if guided else ())]
        suite = Suite(replace(settings, methods=(method,)), replace(models, **students), root / "runs" / name)
        (results,) = suite.perform(replace(TO_NOISE_AND_BACK, decodings=lambda *_: decodings))["inversion"]
        return results

    guided = {ablation.students for ablation in study.ablations.values() if ablation.guided}
    runs = {}
    for name, folder in study.trainings.items():
        students = {part: str(folder / part) for part in ("forward", "reverse")}
        runs[name] = measured(name, "icd", guided=name[0] in guided, **students)
    for ends in dict.fromkeys(ablation.boundaries for ablation in study.ablations.values()):
        name, boundaries = f"untrained-{len(ends)}", ",".join(map(str, ends))
        runs[name] = measured(name, "untrained", guided=len(ends) == 4, boundaries=boundaries)
    runs["ddim"] = measured("ddim", "ddim", guided=True)
    return replace(study, runs=runs)
