"""Scores of results by what is known of a scene: its attributes, and the true result of an edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from icd_lightning.data.manifest import sha256
from icd_lightning.evaluation.examples import Example
from icd_lightning.evaluation.report import Style
from icd_lightning.evaluation.scoring import Columns
from icd_lightning.models.sources import shipped
from icd_lightning.tiny.datamodule import scene_batch
from icd_lightning.tiny.metrics import load_scene_network, psnr_within
from icd_lightning.tiny.scene_network import GROUPS, SceneNetwork, label_tensor
from icd_lightning.tiny.scenes import ABSENT, ATTRIBUTES, LABELS

SHARE, DECIBELS = Style(1, "max", 100.0), Style(2, "max")


class SceneScorer:
    """Scores by a network that reads scenes, by default the one that ships."""

    styles: ClassVar[Mapping[str, Style]]

    def __init__(self, network: SceneNetwork | None = None) -> None:
        self.network = network or load_scene_network()

    @cached_property
    def version(self) -> str:
        return f"1 {sha256(*(shipped() / 'scene_network').glob('*.safetensors'))}"


class SceneAttributes(SceneScorer):
    """Share of a scene's attributes that the scene network finds in the result, by group."""

    styles = dict.fromkeys(GROUPS, SHARE)

    def __call__(self, examples: Sequence[Example], results: Tensor, originals: Tensor | None) -> Columns:
        truth = label_tensor([example.picture for example in examples])
        right, there = self.network.read(results) == truth, truth != ABSENT
        return {group: _share(right, columns_in(there, group)) for group in GROUPS}


class SceneEdits(SceneScorer):
    """An edit against its true result: in the edited region, outside of it, and attribute by attribute."""

    styles = dict.fromkeys(("psnr_truth", "psnr_edited", "psnr_outside"), DECIBELS) | dict.fromkeys(
        ("changed", "kept"), SHARE
    )

    def __call__(self, examples: Sequence[Example], results: Tensor, originals: Tensor | None) -> Columns:
        assert originals is not None
        truths = scene_batch([e.truth for e in examples], [""] * len(examples), results.shape[-1]).images
        edited = (originals != truths).any(1, keepdim=True).float()
        after = label_tensor([example.truth for example in examples])
        right = _in_places_of_truth(self.network.read(results), examples) == after
        change, stay = changed_and_kept(examples)
        return {
            "psnr_truth": psnr_within(results, truths, torch.ones_like(edited)),
            "psnr_edited": psnr_within(results, truths, edited),
            "psnr_outside": psnr_within(results, originals, 1 - edited),
            "changed": _share(right, change),
            "kept": _share(right, stay),
        }


def changed_and_kept(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Which attributes an edit shall change and which it shall keep, bool (B, len(LABELS)), of those that are there."""
    after = label_tensor([example.truth for example in examples])
    before = _in_places_of_truth(label_tensor([example.picture for example in examples]), examples)
    return (before != after) & (after != ABSENT), (before == after) & (after != ABSENT)


def columns_in(counted: Tensor, group: str) -> Tensor:
    """What is counted (B, len(LABELS)), of one group of attributes alone."""
    members = torch.tensor([name in GROUPS[group] for name in LABELS])
    return counted & members


def _in_places_of_truth(labels: Tensor, examples: Sequence[Example]) -> Tensor:
    """Labels (B, len(LABELS)) with a lone object in the place that it has in the true result.

    That is the second where an edit adds an object before it, to the left or above.
    """
    names, labels = list(LABELS), labels.clone()
    first, second = ([names.index(f"{attribute} {place}") for attribute in ATTRIBUTES] for place in (1, 2))
    lone = labels[:, names.index("layout")] == LABELS["layout"].index("single")
    comes_second = [example.truth.things[1:] == example.picture.things for example in examples]
    rows = (lone & torch.tensor(comes_second, device=lone.device)).nonzero()
    labels[rows, second] = labels[rows, first]
    labels[rows, first] = ABSENT
    return labels


def _share(right: Tensor, counted: Tensor) -> Tensor:
    """Of what is counted, how much is right (B,); NaN where nothing is counted."""
    return (right & counted).sum(1) / counted.sum(1)
