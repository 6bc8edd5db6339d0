"""Scores of results, a column each: by the metrics of the registry, and by what is known of a scene.

A scorer takes a batch of examples, results (B, 3, R, R) as their PNG files hold them, and the original pictures, and
returns columns of B values, NaN where a picture has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from icd_lightning.evaluation.examples import Example
from icd_lightning.metrics.base import PerImage, PictureMetric
from icd_lightning.metrics.reconstruction import psnr_within
from icd_lightning.metrics.registry import build_metrics
from icd_lightning.tiny.attributes import GROUPS, label_tensor
from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.metrics import load_scene_network
from icd_lightning.tiny.scene_network import SceneNetwork
from icd_lightning.tiny.scenes import ABSENT, ATTRIBUTES, LABELS, Scene

Columns = Mapping[str, Tensor]
Scorer = Callable[[Sequence[Example], Tensor, Tensor | None], Columns]
SetScorer = Callable[[Iterable[tuple[Tensor, Tensor]]], float]


@dataclass(frozen=True)
class SceneAttributes:
    """Share of a scene's attributes that the scene network finds in the result, by group."""

    network: SceneNetwork

    def __call__(self, examples: Sequence[Example], results: Tensor, originals: Tensor | None) -> Columns:
        truth = label_tensor([_scene(example) for example in examples])
        right, there, names = self.network.read(results) == truth, truth != ABSENT, list(LABELS)
        return {group: _share(right, there, [names.index(m) for m in members]) for group, members in GROUPS.items()}


@dataclass(frozen=True)
class SceneEdits:
    """An edit against its true result: in the edited region, outside of it, and attribute by attribute."""

    network: SceneNetwork

    def __call__(self, examples: Sequence[Example], results: Tensor, originals: Tensor | None) -> Columns:
        assert originals is not None
        truths = scene_batch([_truth(example) for example in examples], [""] * len(examples), results.shape[-1]).images
        edited = (originals != truths).any(1, keepdim=True).float()
        before, after = label_tensor([_scene(e) for e in examples]), label_tensor([_truth(e) for e in examples])
        found, before = (_in_places_of_truth(labels, examples) for labels in (self.network.read(results), before))
        right, changed = found == after, before != after
        everything = list(range(len(LABELS)))
        return {
            "psnr_truth": psnr_within(results, truths, torch.ones_like(edited)),
            "psnr_edited": psnr_within(results, truths, edited),
            "psnr_outside": psnr_within(results, originals, 1 - edited),
            "changed": _share(right, changed & (after != ABSENT), everything),
            "kept": _share(right, ~changed & (after != ABSENT), everything),
        }


def _in_places_of_truth(labels: Tensor, examples: Sequence[Example]) -> Tensor:
    """Labels (B, len(LABELS)) with a lone object in the place that it has in the true result.

    That is the second where an edit adds an object before it, to the left or above.
    """
    names, labels = list(LABELS), labels.clone()
    first, second = ([names.index(f"{attribute} {place}") for attribute in ATTRIBUTES] for place in (1, 2))
    lone = labels[:, names.index("layout")] == LABELS["layout"].index("single")
    comes_second = [_truth(e).things[1:] == _scene(e).things for e in examples]
    rows = (lone & torch.tensor(comes_second, device=lone.device)).nonzero()
    labels[rows, second] = labels[rows, first]
    labels[rows, first] = ABSENT
    return labels


def _share(right: Tensor, counted: Tensor, columns: Sequence[int]) -> Tensor:
    """Of what is counted in these columns, how much is right (B,); NaN where nothing is counted."""
    counted = counted[:, columns]
    return (right[:, columns] & counted).sum(1) / counted.sum(1)


def _scene(example: Example) -> Scene:
    if not isinstance(example.picture, Scene):
        raise ValueError(f"{example.key} is no scene of the tiny world, so that its attributes are not known")
    return example.picture


def _truth(example: Example) -> Scene:
    if example.truth is None:
        raise ValueError(f"the true result of editing {example.key} is not known")
    return example.truth


@dataclass(frozen=True)
class ByMetric:
    """A metric of the registry, for each picture by itself; of an edit, prompts are the target captions."""

    name: str
    metric: PerImage

    def __call__(self, examples: Sequence[Example], results: Tensor, originals: Tensor | None) -> Columns:
        masks = [example.editable(results.shape[-1]) for example in examples] if "masks" in self.metric.needs else []
        known = masks and all(mask is not None for mask in masks)
        tensors = (results, originals, torch.stack(masks) if known else None)
        images, reference, masks = (None if x is None else x.to(self.metric.device) for x in tensors)
        prompts = [example.target or example.caption for example in examples]
        return {self.name: self.metric.per_image(images, reference, prompts=prompts, masks=masks)}


@dataclass(frozen=True)
class OfSets:
    """A metric of the registry over all pictures together."""

    metric: PictureMetric

    def __call__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
        self.metric.reset()
        for results, originals in pairs:
            self.metric.update(results.to(self.metric.device), originals.to(self.metric.device))
        return float(self.metric.compute())


@dataclass(frozen=True)
class Scoring:
    """What to score a run by: each picture alone, and all together."""

    scorers: Mapping[str, Scorer]
    set_scorers: Mapping[str, SetScorer]

    @classmethod
    def choose(
        cls, names: Sequence[str] | None, what: str, examples: Sequence[Example], device: torch.device | str = "cpu"
    ) -> Scoring:
        """By name; by default what suits the examples and what is done to them. A missing network is an error here."""
        scenes = isinstance(examples[0].picture, Scene)
        if names is None:
            masked = examples[0].runs is not None
            names = PIE_BENCH if masked and what == "editing" else (SCENE_METRICS if scenes else METRICS)[what]
        if not scenes and (own := [name for name in names if name in SCENE_SCORERS]):
            raise ValueError(f"metric {own[0]!r} is for scenes of the tiny world, whose attributes are known")
        if "latent-nll" in names and what in ("generation", "editing"):
            raise ValueError(f"metric 'latent-nll' is of noise that pictures become, which {what} does not measure")
        metrics = build_metrics([name for name in names if name not in SCENE_SCORERS])
        metrics = {n: m.to(device) for n, m in metrics.items() if "noise" not in m.needs}  # its likelihood is recorded
        compared = next((name for name, metric in metrics.items() if "reference" in metric.needs), None)
        if compared and examples[0].picture is None:
            raise ValueError(
                f"metric {compared!r} compares with pictures, and the data hold captions alone: name metrics that do "
                "without, as in --metrics clip-t,image-reward"
            )
        scorers: dict[str, Scorer] = {n: ByMetric(n, m) for n, m in metrics.items() if isinstance(m, PerImage)}
        scorers |= {name: make(load_scene_network()) for name, make in SCENE_SCORERS.items() if name in names}
        return cls(scorers, {n: OfSets(m) for n, m in metrics.items() if not isinstance(m, PerImage)})


SCENE_SCORERS = {"attributes": SceneAttributes, "edits": SceneEdits}
"""Metrics of scenes beside the registry's."""
SCENE_METRICS: dict[str, tuple[str, ...]] = {
    "inversion": ("psnr", "ssim", "tiny-perceptual"),
    "thresholds": ("psnr",),
    "guidance": ("psnr", "tiny-fd"),
    "generation": ("tiny-agreement", "tiny-fd"),
    "editing": ("edits", "tiny-agreement"),
}
METRICS: dict[str, tuple[str, ...]] = {
    "inversion": ("psnr", "ssim", "lpips", "dinov2"),
    "thresholds": ("psnr",),
    "guidance": ("psnr", "fid"),
    "generation": ("image-reward", "clip-t", "fid"),
    "editing": ("dinov2", "clip-t", "clip-i", "image-reward"),
}
PIE_BENCH = ("icd", "piebench")
