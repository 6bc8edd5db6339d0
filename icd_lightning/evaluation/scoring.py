"""Scores of results, a column each: by the metrics of the registry, and by what a data set knows of its examples.

A scorer, such as `ByMetric`, takes a batch of examples, results (B, 3, R, R) as their PNG files hold them, and the
original pictures, and returns columns of B values, NaN where a picture has none. Its `styles` say how each column is
printed; its `version` is part of the key of its scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icd_lightning.evaluation.examples import PHOTOGRAPH_SIDE, DataSet, Example
from icd_lightning.evaluation.report import Style
from icd_lightning.metrics.base import PerImage, PictureMetric
from icd_lightning.metrics.reconstruction import LatentNLL
from icd_lightning.metrics.registry import build_metrics

if TYPE_CHECKING:
    from icd_lightning.evaluation.benchmark import Task

Columns = Mapping[str, Tensor]
RECORDED = {"latent_mse": Style(best="min"), "nll": Style(3), "nfe": Style(0), "seconds": Style(3)}
"""Columns of every run that has them, whatever it is scored by."""


class ByMetric:
    """A metric of the registry, for each picture by itself; of an edit, prompts are the target captions."""

    def __init__(self, name: str, metric: PerImage, edits: bool = False) -> None:
        self.name, self.metric, self.edits = name, metric, edits
        self.styles = {name: style_of(metric)}

    @property
    def version(self) -> int:
        return self.metric.version

    def __call__(self, examples: Sequence[Example], results: Tensor, originals: Tensor | None) -> Columns:
        masks = [example.editable(results.shape[-1]) for example in examples] if "masks" in self.metric.needs else []
        tensors = (results, originals, torch.stack(masks) if masks else None)
        images, reference, stacked = (None if x is None else x.to(self.metric.device) for x in tensors)
        prompts = [example.target if self.edits else example.caption for example in examples]
        return {self.name: self.metric.per_image(images, reference, prompts=prompts, masks=stacked)}


def style_of(metric: PictureMetric) -> Style:
    best = {True: "max", False: "min", None: None}[metric.higher_is_better]
    return Style(metric.digits, best, metric.factor)


def score_set(metric: PictureMetric, pairs: Iterable[tuple[Tensor, Tensor | None]]) -> float:
    metric.reset()
    metric.distributed_available_fn = lambda: False  # one rank scores all pictures, while the others wait
    for results, originals in pairs:
        metric.update(results.to(metric.device), None if originals is None else originals.to(metric.device))
    return float(metric.compute())


@dataclass(frozen=True)
class Scoring:
    """What to score a run by: each picture alone, and all together."""

    scorers: Mapping[str, Any]
    of_sets: Mapping[str, PictureMetric]

    @classmethod
    def choose(
        cls,
        names: Sequence[str] | None,
        task: Task,
        data: DataSet,
        side: int = PHOTOGRAPH_SIDE,
        device: torch.device | str = "cpu",
    ) -> Scoring:
        """By name; by default what suits the examples and what is done to them.

        A missing network is an error here, and so are pictures too small for a metric, of `side` pixels.
        """
        names = names or data.metrics.get(task.name) or task.metrics
        others = [name for name in names if name not in data.scorers]
        metrics = build_metrics(others) if others else {}
        for name, metric in metrics.items():
            _check(name, metric, task, data)
            metric.check_side(side)
        # the likelihood of noise is recorded while it is there
        metrics = {n: m.to(device) for n, m in metrics.items() if not isinstance(m, LatentNLL)}
        scorers = {n: ByMetric(n, m, task.edits) for n, m in metrics.items() if isinstance(m, PerImage)}
        scorers |= {name: data.scorers[name]() for name in names if name in data.scorers}
        return cls(scorers, {n: m for n, m in metrics.items() if not isinstance(m, PerImage)})

    @property
    def styles(self) -> dict[str, Style]:
        columns = {column: style for scorer in self.scorers.values() for column, style in scorer.styles.items()}
        return {**RECORDED, **columns, **{name: style_of(metric) for name, metric in self.of_sets.items()}}


def _check(name: str, metric: PictureMetric, task: Task, data: DataSet) -> None:
    """What is not there is complained of before anything is measured."""
    first = data.examples[0]
    if "noise" in metric.needs and task.name in ("generation", "editing"):
        raise ValueError(f"metric {name!r} is of noise that pictures become, which {task.name} does not measure")
    if "reference" in metric.needs and first.picture is None:
        raise ValueError(
            f"metric {name!r} compares with pictures, and the data hold captions alone: name metrics that do without, "
            "as in --metrics clip-t,image-reward"
        )
    if "masks" in metric.needs and first.runs is None and first.truth is None:
        raise ValueError(f"metric {name!r} is of a part of the picture, and {data.name} do not say which is edited")
    given = ("images", "reference", *(("prompts", "masks") if isinstance(metric, PerImage) else ()))
    lacking = [need for need in metric.needs if need not in given]
    if lacking and not isinstance(metric, LatentNLL):
        raise ValueError(
            f"metric {name!r} needs {lacking[0]}, which it is not given here: a metric of each picture gets images, "
            "reference, prompts and masks, one of all together images and reference"
        )
