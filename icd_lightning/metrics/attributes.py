"""Does a picture of the tiny world show what its caption says? Counted attribute by attribute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from icd_lightning.data.shapes import ABSENT, LABELS, Scene, labels

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


def attribute_accuracy(found: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Share of attributes that are right, by group; found, truth long (B, len(LABELS)), ABSENT in truth not counted."""
    names = list(LABELS)
    result = {}
    for group, members in GROUPS.items():
        columns = [names.index(member) for member in members]
        counted = truth[:, columns] != ABSENT
        right = (found[:, columns] == truth[:, columns]) & counted
        result[group] = right.sum() / counted.sum().clamp(min=1)
    return result
