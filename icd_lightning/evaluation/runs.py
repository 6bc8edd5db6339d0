"""A method on a benchmark: pictures as PNG, one row each, scores from the files, and a record of how it was done.

A run's folder is named after what determines its figures, so that settings never mix and a second call finds the first
one's work:

    method-1a2b3c4d/config.json      benchmark, method, weights, seeds, versions
                    parts/           what is done so far, batch by batch
                    images/          results, a folder for each decoding, each with the identity of its example
                    rows.parquet     one row for each picture and decoding
                    results.json     means with confidence intervals, evaluations, seconds

The list of examples is cut into batches once and for all; rank r of n takes every n-th batch from the r-th on, and what
a batch gave is a small Parquet file of its own, there or not there. So a run that was killed and started again, or
shared among ranks, puts together the very rows of an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor

from icd_lightning.data.images import save_png, to_pictures
from icd_lightning.editing.pictures import NOT_FINITE_REMEDY
from icd_lightning.evaluation.benchmark import Outcome
from icd_lightning.evaluation.decodings import Options
from icd_lightning.evaluation.examples import DataSet, Example, stack
from icd_lightning.evaluation.results import CONFIG, MEANS, ROWS, Results, is_made_of, picture_path, read_results, slug
from icd_lightning.evaluation.scoring import Scoring, score_set
from icd_lightning.files import read_object, write_json, write_whole
from icd_lightning.progress import progress

log = logging.getLogger(__name__)

PACKAGES = ("icd-lightning", "torch", "diffusers", "transformers", "peft", "numpy", "pillow")
Row = dict[str, Any]
Item = TypeVar("Item")


def ranks() -> tuple[int, int]:
    """The rank of this process and how many share the work, as torchrun says; alone without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait() -> None:
    if ranks()[1] == 1:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    torch.distributed.barrier()


def batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@dataclass(frozen=True)
class Run:
    """What to measure: `measure` turns a batch into outcomes; `determinants` are all that its figures depend on."""

    name: str
    root: Path
    data: DataSet
    measure: Callable[[Sequence[Example]], Iterator[Outcome]]
    determinants: Mapping[str, Any]
    resolution: int
    batch_size: int = 16
    scoring: Scoring = field(default_factory=lambda: Scoring({}, {}))
    decodings: Mapping[str, Options] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        text = json.dumps([self.determinants, self.batch_size, self.resolution], sort_keys=True, default=str)
        return self.root / f"{slug(self.name)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def score_resolution(self) -> int:
        """Pixels of a side of the pictures that are scored, and of their originals."""
        return self.data.score_side(self.resolution)

    def version(self, name: str) -> str:
        """Of scores by this name: what they depend on, beside the pictures."""
        scorer = self.scoring.scorers.get(name) or self.scoring.of_sets[name]
        return f"{name} {scorer.version} at {self.score_resolution}"

    def originals(self, batch: Sequence[Example]) -> Tensor | None:
        """To compare results with, (B, 3, R, R); None of captions alone."""
        return None if batch[0].picture is None else stack(batch, self.score_resolution)

    def gather(
        self,
        name: str,
        measure: Callable[[Sequence[Example]], list[Row]],
        *,
        version: str = "",
        is_whole: Callable[[pd.DataFrame, Sequence[Example]], bool] = lambda rows, batch: True,
    ) -> pd.DataFrame:
        """The rows that `measure` gives for all examples, in their order; what was measured before is read back.

        Rows of another version are measured again, and so are those that are not whole any more.
        """
        folder, parts = self.folder / "parts" / slug(name), {}
        for index, batch in enumerate(batches(self.data.examples, self.batch_size)):
            text = "\n".join((version, *(example.identity for example in batch)))  # other examples make other files
            parts[folder / f"{index:06d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.parquet"] = batch
        rank, world_size = ranks()
        share = list(parts.items())[rank::world_size]
        missing = [one for one in share if (rows := _rows_of(*one)) is None or not is_whole(rows, one[1])]
        if len(missing) < len(share):
            log.info("%s: %d of %d batches were measured before", folder, len(share) - len(missing), len(share))
        for file, batch in progress(missing, f"{self.name}: {name}", len(missing)):
            write_whole(file, pd.DataFrame(measure(batch)).to_parquet)
        wait()
        return pd.concat(map(pd.read_parquet, parts), ignore_index=True)

    def record(self) -> dict[str, Any]:
        """What a reader of the figures should know: all that they depend on, and more."""
        return {
            "run": self.name,
            **self.determinants,
            "count": len(self.data.examples),
            "batch_size": self.batch_size,
            "resolution": self.resolution,
            "scored_at": self.score_resolution,
            "metrics": [*self.scoring.scorers, *self.scoring.of_sets],
            "options": self.decodings,
            "columns": {column: style._asdict() for column, style in self.scoring.styles.items()},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "ranks": ranks()[1]},
        }


def perform(run: Run) -> Results:
    """Do what is not done yet, and score it; rank 0 writes the run's files, and alone has the scores of sets."""
    first = ranks()[0] == 0
    if first:
        write_json(run.folder / CONFIG, run.record())

    def are_there(rows: pd.DataFrame, batch: Sequence[Example]) -> bool:
        examples = {example.key: example for example in batch}
        return all(is_made_of(run.folder / file, examples[key]) for key, file in zip(rows.key, rows.image, strict=True))

    frame = run.gather("pictures", partial(_make, run), is_whole=are_there)
    decodings = list(frame.decoding.unique())
    for name, scorer in run.scoring.scorers.items():
        scores = run.gather(name, partial(_score, run, scorer, decodings), version=run.version(name))
        frame = frame.merge(scores, on=["key", "decoding"])
    set_scores = _score_sets(run, decodings) if first else {}
    results = Results(run.name, frame, set_scores, run.folder, run.decodings, run.scoring.styles)
    if first:
        write_whole(run.folder / ROWS, frame.to_parquet)
        write_json(run.folder / MEANS, results.as_dict())
    wait()
    return results


def _rows_of(file: Path, batch: Sequence[Example]) -> pd.DataFrame | None:
    """What was measured before of a batch; None if that is not there, or damaged."""
    if not file.is_file():
        return None
    with suppress(OSError, ValueError):
        rows = pd.read_parquet(file)
        if "key" in rows and {*rows.key} == {example.key for example in batch}:
            return rows
    log.warning("%s is damaged: its pictures are measured anew", file)
    return None


def _make(run: Run, batch: Sequence[Example]) -> list[Row]:
    rows = []
    for outcome in run.measure(batch):
        _check_outcome(run, outcome, len(batch))
        if not outcome.images.isfinite().all():
            raise ValueError(f"{run.name}, {outcome.decoding}: a result is not finite: {NOT_FINITE_REMEDY}")
        for index, (example, picture) in enumerate(zip(batch, to_pictures(outcome.images), strict=True)):
            path = picture_path(outcome.decoding, example)
            about = {"caption": example.caption, "target": example.target, "decoding": outcome.decoding}
            about |= {"example": example.identity}
            save_png(picture, run.folder / path, about={name: text for name, text in about.items() if text})
            row = {"key": example.key, "decoding": outcome.decoding, "kind": example.kind, "image": str(path)}
            row |= {"nfe": outcome.nfe, "seconds": outcome.seconds}
            rows.append(row | {name: float(value[index]) for name, value in outcome.values.items()})
    if not rows:
        raise ValueError(f"{run.name}: the task's measure gives nothing: yield an Outcome for each decoding")
    return rows


def _check_outcome(run: Run, outcome: object, count: int) -> None:
    """ValueError for anything but pictures, and values, of each example."""
    if not isinstance(outcome, Outcome):
        raise ValueError(f"{run.name}: the task's measure yields a {type(outcome).__name__}: yield an Outcome")
    counts = {"images": tuple(outcome.images.shape)[:1], **{name: tuple(v.shape) for name, v in outcome.values.items()}}
    if wrong := [f"{name} of {shape}" for name, shape in counts.items() if shape != (count,)]:
        raise ValueError(f"{run.name}, {outcome.decoding}: {wrong[0]}, and {count} examples: give one for each of them")


def _score(run: Run, scorer: Any, decodings: Sequence[str], batch: Sequence[Example]) -> list[Row]:
    originals, rows = run.originals(batch), []
    for decoding in decodings:
        columns = scorer(batch, read_results(run.folder, decoding, batch, run.score_resolution), originals)
        for index, example in enumerate(batch):
            values = {name: float(value[index]) for name, value in columns.items()}
            rows.append({"key": example.key, "decoding": decoding, **values})
    return rows


def _score_sets(run: Run, decodings: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of the pictures of each decoding together, such as Frechet distances; what was computed before is read back."""
    scores = {}
    for name, metric in run.scoring.of_sets.items():
        identities = [example.identity for example in run.data.examples]
        key = hashlib.sha256(repr([run.version(name), identities, decodings]).encode()).hexdigest()
        file = run.folder / "parts" / f"{slug(name)}.json"
        stored = read_object(file) if file.is_file() else {}
        if stored.get("key") != key:
            stored = {"key": key, "scores": {}}
            for decoding in decodings:
                parts = batches(run.data.examples, run.batch_size)
                made = (read_results(run.folder, decoding, batch, run.score_resolution) for batch in parts)
                stored["scores"][decoding] = score_set(metric, zip(made, map(run.originals, parts), strict=True))
            write_json(file, stored)
        scores[name] = stored["scores"]
    return scores
