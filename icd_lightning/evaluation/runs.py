"""A method on a benchmark: pictures as PNG, one row each, scores from the files, and a record of how it was done.

A run's folder is named after what determines its figures, so that settings never mix and a second call finds the first
one's work:

    method-1a2b3c4d/config.json      benchmark, method, weights, seeds, versions
                    parts/           what is done so far, batch by batch
                    images/          results, a folder for each decoding
                    rows.parquet     one row for each picture and decoding
                    results.json     means with confidence intervals, evaluations, seconds

A summary, such as table2.json or guidance.json, names the runs that its figures were made of: `read_runs` finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from icd_lightning.data.images import read_picture, resize_and_crop, save_png, to_images, to_pictures
from icd_lightning.evaluation.benchmarks import Outcome
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.rows import ALONE, Ranks, Row, gather_rows, read_rows, write_rows
from icd_lightning.evaluation.scoring import Scorer, SetScorer
from icd_lightning.evaluation.statistics import Estimate, bootstrap
from icd_lightning.tiny.study import remembered, write_json

ALL = "all"
PACKAGES = ("icd-lightning", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
CONFIG, ROWS, MEANS = "config.json", "rows.parquet", "results.json"
NOT_MEASURED = ("key", "decoding", "kind", "image")
"""Columns of a row that are no figures."""


@dataclass(frozen=True)
class Run:
    """What to measure: `measure` turns a batch into outcomes; `determinants` are all that its figures depend on.

    Pictures of more than `scored_at` pixels a side are scored at that size, and so are their originals.
    """

    name: str
    root: Path
    examples: Sequence[Example]
    measure: Callable[[Sequence[Example]], Iterator[Outcome]]
    determinants: Mapping[str, Any]
    resolution: int
    batch_size: int = 16
    scored_at: int | None = None
    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    set_scorers: Mapping[str, SetScorer] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of everything that this run writes."""
        text = json.dumps([self.determinants, self.batch_size, self.resolution], sort_keys=True, default=str)
        return self.root / f"{slug(self.name)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def score_resolution(self) -> int:
        """Pixels of a side of the pictures that are scored."""
        return min(self.resolution, self.scored_at or self.resolution)


@dataclass(frozen=True)
class Results:
    """The rows of a run in its folder, and its sets' scores by decoding: name -> decoding -> value."""

    name: str
    rows: Sequence[Row]
    set_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    folder: Path = Path()

    @classmethod
    def read(cls, name: str, folder: Path) -> Results:
        """What `perform` left in a run's folder."""
        rows, means = read_rows(folder / ROWS), json.loads((folder / MEANS).read_text())
        of_sets = [score for score in next(iter(means.values()))[ALL] if score not in rows[0]]
        scores = {score: {decoding: kinds[ALL][score] for decoding, kinds in means.items()} for score in of_sets}
        return cls(name, rows, scores, folder)

    @property
    def decodings(self) -> list[str]:
        """In the order of their measurement."""
        return list(dict.fromkeys(row["decoding"] for row in self.rows))

    @property
    def kinds(self) -> list[str]:
        """Types of edits, in the order of their appearance; none where examples have no types."""
        return [kind for kind in dict.fromkeys(row["kind"] for row in self.rows) if kind]

    @property
    def columns(self) -> list[str]:
        """Names of all figures of a row."""
        return [name for name in self.rows[0] if name not in NOT_MEASURED]

    def values(self, column: str, decoding: str, kind: str = ALL) -> np.ndarray:
        """One value for each picture, NaN where there is none."""
        chosen = [row for row in self.rows if row["decoding"] == decoding and kind in (ALL, row["kind"])]
        return np.array([np.nan if row[column] is None else row[column] for row in chosen], dtype=float)

    def mean(self, column: str, decoding: str, kind: str = ALL) -> Estimate | float | None:
        """Mean with confidence interval of a column, or a set's score; None where it means nothing."""
        if column in self.set_scores:
            return self.set_scores[column].get(decoding) if kind == ALL else None
        values = self.values(column, decoding, kind)
        return None if np.isnan(values).all() else bootstrap(values)

    def as_dict(self) -> dict[str, Any]:
        """Means by decoding, in all and by kind, fit for JSON."""
        return {
            decoding: {kind: self._means(decoding, kind) for kind in (ALL, *self.kinds)} for decoding in self.decodings
        }

    def _means(self, decoding: str, kind: str) -> dict[str, Any]:
        means = {column: self.mean(column, decoding, kind) for column in (*self.columns, *self.set_scores)}
        return {name: v.as_dict() if isinstance(v, Estimate) else v for name, v in means.items()}


MADE_BY = {
    "table2.json": "icd ablations",
    "guidance.json": "icd eval --benchmark guidance --method icd,ddim",
    "generation.json": "icd eval --benchmark generation --grid 'tau1=0.2,0.4,0.6,0.8,1 tau2=0.4,0.6,0.8,1'",
}
"""The commands whose summaries the notebooks read."""


def places(folders: Mapping[str, Path], root: Path) -> dict[str, str]:
    """Where folders lie, seen from `root`: so that a whole of results can be moved."""
    return {name: Path(os.path.relpath(folder, root)).as_posix() for name, folder in folders.items()}


def read_summary(file: Path) -> dict[str, Any]:
    """A summary, which names its `runs`; FileNotFoundError says what makes it."""
    if not file.is_file():
        command = MADE_BY.get(file.name, "icd eval")
        raise FileNotFoundError(
            f"there is no {file}: `{command}` makes it, by default in outputs/; a notebook reads it from there with "
            "ICD_RESULTS set to that folder"
        )
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}): make it again; what was measured before is reused") from error


def read_runs(file: Path) -> dict[str, Results]:
    """The runs that a summary was made of, by name."""
    found = read_summary(file).get("runs")
    if found is None:
        raise ValueError(f"{file} does not name its runs: make it again; what was measured before is reused")
    return {name: Results.read(name, file.parent / place) for name, place in found.items()}


def perform(run: Run, ranks: Ranks = ALONE) -> Results:
    """Do what is not done yet, and score it; rank 0 writes the run's files, and alone has the scores of sets."""
    if ranks.rank == 0:
        write_json(run.folder / CONFIG, {"run": run.name, **run.determinants, **_record(run, ranks)})
    made = gather_rows(
        run.folder / "parts" / "pictures", run.examples, lambda batch: _make(run, batch), **_how(run, ranks)
    )
    decodings = list(dict.fromkeys(row["decoding"] for row in made))
    rows = {(row["key"], row["decoding"]): row for row in made}
    for name, scorer in run.scorers.items():
        folder = run.folder / "parts" / slug(name)
        for row in gather_rows(
            folder, run.examples, lambda b, s=scorer: _score(run, s, b, decodings), **_how(run, ranks)
        ):
            rows[row["key"], row["decoding"]] |= row
    set_scores = _score_sets(run, decodings) if ranks.rank == 0 else {}
    results = Results(run.name, list(rows.values()), set_scores, run.folder)
    if ranks.rank == 0:
        write_rows(run.folder / ROWS, results.rows)
        write_json(run.folder / MEANS, results.as_dict())
    ranks.wait()
    return results


def _how(run: Run, ranks: Ranks) -> dict[str, Any]:
    return {"batch_size": run.batch_size, "ranks": ranks}


def _make(run: Run, batch: Sequence[Example]) -> list[Row]:
    """Let the method work on a batch; write its pictures, return a row for each."""
    rows = []
    for outcome in run.measure(batch):
        for index, (example, picture) in enumerate(zip(batch, to_pictures(outcome.images), strict=True)):
            path = _picture(outcome.decoding, example)
            about = {"caption": example.caption, "target": example.target, "decoding": outcome.decoding}
            save_png(picture, run.folder / path, about={name: text for name, text in about.items() if text})
            values = {name: float(value[index]) for name, value in outcome.values.items()}
            rows.append(
                {
                    **{"key": example.key, "decoding": outcome.decoding, "kind": example.kind, "image": str(path)},
                    **{"nfe": outcome.nfe, "seconds": outcome.seconds, **values},
                }
            )
    return rows


def _score(run: Run, scorer: Scorer, batch: Sequence[Example], decodings: Sequence[str]) -> list[Row]:
    side = run.score_resolution
    originals = stack(batch, side) if batch[0].picture is not None else None
    rows = []
    for decoding in decodings:
        columns = scorer(batch, read_results(run.folder, decoding, batch, side), originals)
        for index, example in enumerate(batch):
            values = {name: float(value[index]) for name, value in columns.items()}
            rows.append({"key": example.key, "decoding": decoding, **values})
    return rows


def _score_sets(run: Run, decodings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the pictures of each decoding together, such as Frechet distances."""
    key = {"examples": [example.key for example in run.examples], "decodings": decodings}
    return {
        name: remembered(
            run.folder / "parts" / f"{slug(name)}.json",
            key,
            lambda scorer=scorer: {decoding: scorer(_pairs(run, decoding)) for decoding in decodings},
        )
        for name, scorer in run.set_scorers.items()
    }


def _pairs(run: Run, decoding: str) -> Iterator[tuple[Tensor, Tensor]]:
    """A decoding's pictures and the originals, batch by batch."""
    for start in range(0, len(run.examples), run.batch_size):
        batch = run.examples[start : start + run.batch_size]
        side = run.score_resolution
        yield read_results(run.folder, decoding, batch, side), stack(batch, side)


def read_results(folder: Path, decoding: str, batch: Sequence[Example], resolution: int | None = None) -> Tensor:
    """A decoding's pictures of a batch, (B, 3, R, R), as the PNG files in a run's folder hold them, or resized."""
    pictures = [read_picture(folder / _picture(decoding, example)) for example in batch]
    if resolution is not None:
        pictures = [resize_and_crop(picture, resolution)[0] for picture in pictures]
    return to_images([np.asarray(picture) for picture in pictures])


def _picture(decoding: str, example: Example) -> Path:
    return Path("images") / slug(decoding) / f"{quote(example.key, safe='')}.png"


def slug(text: str) -> str:
    """A name for a folder: "w 3, tau 0.8" -> "w-3-tau-0.8"."""
    return re.sub(r"[^\w.=+]+", "-", text).strip("-").lower()


def _record(run: Run, ranks: Ranks) -> dict[str, Any]:
    """What a reader of the figures should know, and what they do not depend on, or hardly."""
    packages = {name: version(name) for name in PACKAGES}
    return {
        "count": len(run.examples),
        "batch_size": run.batch_size,
        "resolution": run.resolution,
        "scored_at": run.score_resolution,
        "metrics": [*run.scorers, *run.set_scorers],
        "versions": {"python": platform.python_version(), **packages},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "ranks": ranks.world_size},
    }
