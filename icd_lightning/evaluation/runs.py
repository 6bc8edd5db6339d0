"""A method on a benchmark: pictures as PNG, one row each, scores from the files, and a record of how it was done.

A run's folder is named after what determines its figures, so that settings never mix and a second call finds the first
one's work:

    method-1a2b3c4d/config.json      benchmark, method, weights, seeds, versions
                    parts/           what is done so far, batch by batch
                    images/          results, a folder for each decoding, each with the identity of its example
                    rows.parquet     one row for each picture and decoding
                    results.json     means with confidence intervals, evaluations, seconds

A summary, such as table2.json or guidance.json, names the runs that its figures were made of: `read_runs` finds them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from icd_lightning.data.images import read_picture, resize_and_crop, save_png, to_images, to_pictures
from icd_lightning.evaluation.bench import Outcome
from icd_lightning.evaluation.decodings import Options
from icd_lightning.evaluation.examples import Example, stack
from icd_lightning.evaluation.rows import ALONE, Gathering, Ranks, Row, batches, gather_rows, read_rows, write_rows
from icd_lightning.evaluation.scoring import Scorer, Scoring, Style
from icd_lightning.evaluation.statistics import Estimate, bootstrap
from icd_lightning.files import read_object, write_json

log = logging.getLogger(__name__)

ALL = "all"
PACKAGES = ("icd-lightning", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
CONFIG, ROWS, MEANS = "config.json", "rows.parquet", "results.json"
NOT_MEASURED = ("key", "decoding", "kind", "image")
"""Columns of a row that are no figures."""


@dataclass(frozen=True)
class Run:
    """What to measure: `measure` turns a batch into outcomes; `determinants` are all that its figures depend on.

    Pictures of more than `scored_at` pixels a side are scored at that size, and so are their originals. `decodings` are
    the options of each by its name.
    """

    name: str
    root: Path
    examples: Sequence[Example]
    measure: Callable[[Sequence[Example]], Iterator[Outcome]]
    determinants: Mapping[str, Any]
    resolution: int
    batch_size: int = 16
    scored_at: int | None = None
    scoring: Scoring = field(default_factory=lambda: Scoring({}, {}))
    decodings: Mapping[str, Options] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Of everything that this run writes."""
        text = json.dumps([self.determinants, self.batch_size, self.resolution], sort_keys=True, default=str)
        return self.root / f"{slug(self.name)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def score_resolution(self) -> int:
        """Pixels of a side of the pictures that are scored."""
        return min(self.resolution, self.scored_at or self.resolution)


@dataclass(frozen=True, eq=False)
class Results:
    """A run in its folder: a row for each picture and decoding, and its sets' scores, name -> decoding -> value.

    options: of each decoding by its name; styles: how columns are printed.
    """

    name: str
    frame: pd.DataFrame
    set_scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    folder: Path = Path()
    options: Mapping[str, Options] = field(default_factory=dict)
    styles: Mapping[str, Style] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, folder: Path) -> Results:
        """What `perform` left in a run's folder."""
        rows, means, config = read_rows(folder / ROWS), read_object(folder / MEANS), read_object(folder / CONFIG)
        of_sets = [score for score in next(iter(means.values()))[ALL] if score not in rows[0]]
        scores = {score: {decoding: kinds[ALL][score] for decoding, kinds in means.items()} for score in of_sets}
        styles = {column: Style(**style) for column, style in config.get("columns", {}).items()}
        return cls(name, pd.DataFrame(rows), scores, folder, config.get("options", {}), styles)

    @property
    def decodings(self) -> list[str]:
        """In the order of their measurement."""
        return list(self.frame.decoding.unique())

    @property
    def kinds(self) -> list[str]:
        """Types of edits, in the order of their appearance; none where examples have no types."""
        return [kind for kind in self.frame.kind.unique() if kind]

    @property
    def columns(self) -> list[str]:
        """Names of all figures of a row."""
        return [name for name in self.frame.columns if name not in NOT_MEASURED]

    def of(self, decoding: str, kind: str = ALL) -> pd.DataFrame:
        """The rows of a decoding, a picture each."""
        frame = self.frame[self.frame.decoding == decoding]
        return frame if kind == ALL else frame[frame.kind == kind]

    def style(self, column: str) -> Style:
        """How a column is printed."""
        return self.styles.get(column, Style())

    def values(self, column: str, decoding: str, kind: str = ALL) -> np.ndarray:
        """One value for each picture, NaN where there is none."""
        return self.of(decoding, kind)[column].to_numpy(dtype=float)

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

    def beside(self, other: Results) -> Results:
        """With the columns that another run has over the same pictures and decodings."""
        new = [name for name in other.frame.columns if name not in self.frame.columns]
        keys = ["key", "decoding"]
        frame = self.frame.merge(other.frame[[*keys, *new]], on=keys, how="left")
        scores, styles = {**other.set_scores, **self.set_scores}, {**other.styles, **self.styles}
        return replace(self, frame=frame, set_scores=scores, styles=styles)


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
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{error}: make it again; what was measured before is reused") from error


def read_runs(file: Path) -> dict[str, Results]:
    """The runs that a summary was made of, by name."""
    runs = read_summary(file).get("runs")
    if runs is None:
        raise ValueError(f"{file} does not name its runs: make it again; what was measured before is reused")
    return {name: Results.read(name, file.parent / place) for name, place in runs.items()}


# --- doing it ---------------------------------------------------------------------------------------------------------


def perform(run: Run, ranks: Ranks = ALONE) -> Results:
    """Do what is not done yet, and score it; rank 0 writes the run's files, and alone has the scores of sets."""
    if ranks.rank == 0:
        write_json(run.folder / CONFIG, {"run": run.name, **run.determinants, **_record(run, ranks)})
    how = Gathering(run.batch_size, ranks, run.name)
    pictures = run.folder / "parts" / "pictures"
    recorded = gather_rows(pictures, run.examples, partial(_make, run), how, is_whole=partial(_are_there, run.folder))
    decodings = list(dict.fromkeys(row["decoding"] for row in recorded))
    rows = {(row["key"], row["decoding"]): row for row in recorded}
    for name, scorer in run.scoring.scorers.items():
        score = partial(_score, run, scorer, decodings)
        how = replace(how, label=f"{run.name}: {name}")
        folder = run.folder / "parts" / slug(name)
        for row in gather_rows(folder, run.examples, score, how, version=_version(run, name, scorer)):
            rows[row["key"], row["decoding"]] |= row
    set_scores = _score_sets(run, decodings) if ranks.rank == 0 else {}
    frame = pd.DataFrame(list(rows.values()))
    results = Results(run.name, frame, set_scores, run.folder, run.decodings, run.scoring.styles)
    if ranks.rank == 0:
        write_rows(run.folder / ROWS, list(rows.values()))
        write_json(run.folder / MEANS, results.as_dict())
    ranks.wait()
    return results


def _version(run: Run, name: str, scorer: Any) -> str:
    return f"{name} {scorer.version} at {run.score_resolution}"


def _make(run: Run, batch: Sequence[Example]) -> list[Row]:
    """Let the method work on a batch; write its pictures, return a row for each."""
    rows = []
    for outcome in run.measure(batch):
        for index, (example, picture) in enumerate(zip(batch, to_pictures(outcome.images), strict=True)):
            path = _picture(outcome.decoding, example)
            about = {"caption": example.caption, "target": example.target, "decoding": outcome.decoding}
            about |= {"example": example.identity}
            save_png(picture, run.folder / path, about={name: text for name, text in about.items() if text})
            values = {name: float(value[index]) for name, value in outcome.values.items()}
            rows.append(
                {
                    **{"key": example.key, "decoding": outcome.decoding, "kind": example.kind, "image": str(path)},
                    **{"nfe": outcome.nfe, "seconds": outcome.seconds, **values},
                }
            )
    return rows


def _are_there(folder: Path, rows: Sequence[Row], batch: Sequence[Example]) -> bool:
    """Whether the pictures of rows are there, and of these very examples: another data set may have replaced them."""
    identities = {example.key: example.identity for example in batch}
    return all(_made_of(folder / row["image"]) == identities[row["key"]] for row in rows)


def _made_of(file: Path) -> str | None:
    """The identity of the example that a picture was made of."""
    try:
        with Image.open(file) as picture:
            return picture.info.get("example")
    except OSError:
        return None


def _score(run: Run, scorer: Scorer, decodings: Sequence[str], batch: Sequence[Example]) -> list[Row]:
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
    """Of the pictures of each decoding together, such as Frechet distances; what was computed before is read back."""
    scores = {}
    for name, scorer in run.scoring.set_scorers.items():
        identities = [example.identity for example in run.examples]
        key = hashlib.sha256(repr([_version(run, name, scorer), identities, decodings]).encode()).hexdigest()
        file = run.folder / "parts" / f"{slug(name)}.json"
        stored = read_object(file) if file.is_file() else {}
        if stored.get("key") != key:
            stored = {"key": key, "scores": {decoding: scorer(_pairs(run, decoding)) for decoding in decodings}}
            write_json(file, stored)
        scores[name] = stored["scores"]
    return scores


def _pairs(run: Run, decoding: str) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A decoding's pictures and the originals, batch by batch."""
    side = run.score_resolution
    for batch in batches(run.examples, run.batch_size):
        originals = stack(batch, side) if batch[0].picture is not None else None
        yield read_results(run.folder, decoding, batch, side), originals


def read_results(folder: Path, decoding: str, batch: Sequence[Example], resolution: int | None = None) -> Tensor:
    """A decoding's pictures of a batch, (B, 3, R, R), as the PNG files in a run's folder hold them, or resized."""
    files = [folder / _picture(decoding, example) for example in batch]
    for file, example in zip(files, batch, strict=True):
        if _made_of(file) != example.identity:
            raise ValueError(f"{file} is not a result of {example.key}: run it again, which makes the picture anew")
    pictures = [read_picture(file) for file in files]
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
        "metrics": [*run.scoring.scorers, *run.scoring.set_scorers],
        "options": run.decodings,
        "columns": {column: style._asdict() for column, style in run.scoring.styles.items()},
        "versions": {"python": platform.python_version(), **packages},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "ranks": ranks.world_size},
    }
