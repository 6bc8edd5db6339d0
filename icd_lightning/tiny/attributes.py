"""Does a picture of the tiny world show what its caption says? Counted attribute by attribute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from icd_lightning.tiny.scenes import ABSENT, ATTRIBUTES, LABELS, RELATIONS, Scene, labels

GROUPS = {
    "layout": ("layout",),
    "background color": ("background color",),
    "background texture": ("background texture",),
    **{f"object {name}": (f"{name} 1", f"{name} 2") for name in ("color", "shape", "size", "texture")},
}
"""Attributes that are counted together: those of both objects count as one kind."""


def label_tensor(scenes: Sequence[Scene]) -> Tensor:
    """What the scenes show, long (B, len(LABELS))."""
    return torch.from_numpy(np.stack([labels(scene) for scene in scenes]))


def caption_labels(caption: str) -> Tensor:
    """What a caption says, long (len(LABELS),): ABSENT for what it leaves open; no word for a texture means plain.

    ValueError for a caption that is none of the tiny world's.
    """
    objects, _, background = caption.lower().partition(" on ")
    relation = next((name for name in RELATIONS if f" {name} " in objects), None)
    layout = "single" if relation is None else "vertical" if RELATIONS[relation][0] == 0 else "horizontal"
    stated = {"layout": layout}
    for slot, words in enumerate(objects.split(f" {relation} "), 1):
        stated |= {f"{attribute} {slot}": word for attribute, word in _attributes(words, caption).items()}
    if background:
        attributes = _attributes(background.removesuffix(" background"), caption)
        stated |= {f"background {attribute}": word for attribute, word in attributes.items()}
    if unknown := stated.keys() - LABELS.keys():
        raise ValueError(f"no {sorted(unknown)[0]} can be had in the tiny world, as {caption!r} wants it")
    return torch.tensor([LABELS[name].index(stated[name]) if name in stated else ABSENT for name in LABELS])


def _attributes(words: str, caption: str) -> dict[str, str]:
    """The attributes that words such as "a small red ring" name."""
    attribute_of = {option: attribute for attribute, options in ATTRIBUTES.items() for option in options}
    attributes = {"texture": "plain"}
    for word in words.removeprefix("an ").removeprefix("a ").split():
        if word not in attribute_of:
            raise ValueError(f"{caption!r} is no caption of the tiny world: {word!r} is not one of its words")
        attributes[attribute_of[word]] = word
    return attributes


def attribute_accuracy(predicted: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Share of right attributes, by group; predicted, truth long (B, len(LABELS)), ABSENT in truth not counted."""
    names = list(LABELS)
    result = {}
    for group, members in GROUPS.items():
        columns = [names.index(member) for member in members]
        counted = truth[:, columns] != ABSENT
        right = (predicted[:, columns] == truth[:, columns]) & counted
        result[group] = right.sum() / counted.sum().clamp(min=1)
    return result
