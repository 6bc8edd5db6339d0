"""A small network that reads pictures of the tiny world: what is where, in which colour, shape, size and texture.

It judges generated and edited pictures (attribute accuracy), and its features serve distances of their own names. It is
not Inception, CLIP or DINO, and its figures are comparable with nothing but each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from icd_lightning.tiny.scenes import ABSENT, ATTRIBUTES, LABELS, RELATIONS, Scene, labels

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


class SceneNetwork(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] -> logits of every attribute in LABELS.

    Args:
        channels: width after each halving of the picture; the last map, 4 x 4, is read position by position.
        feature_dim: width of the features before the heads.
    """

    def __init__(self, channels: tuple[int, ...] = (24, 48, 96, 128), feature_dim: int = 256) -> None:
        super().__init__()
        self.config = {"channels": list(channels), "feature_dim": feature_dim}
        blocks: list[nn.Module] = []
        for before, after in zip((3, *channels[:-1]), channels, strict=True):
            blocks += [
                *(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()),
                *(nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()),
            ]
        self.body = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels[-1] * 4 * 4, feature_dim), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(feature_dim, len(options)) for options in LABELS.values())

    def features(self, images: Tensor) -> Tensor:
        """The last layer before the heads, (B, feature_dim)."""
        if images.shape[-2:] != (64, 64):
            raise ValueError(f"the scene network reads pictures of 64 x 64 pixels, got {tuple(images.shape[-2:])}")
        return self.body(images)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, number of options) of each attribute."""
        features = self.features(images)
        return {name: head(features) for name, head in zip(LABELS, self.heads, strict=True)}

    @torch.no_grad()
    def read(self, images: Tensor) -> Tensor:
        """The most likely option of each attribute, long (B, len(LABELS))."""
        return torch.stack([logits.argmax(1) for logits in self(images).values()], dim=1)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        (folder / WEIGHTS_NAME).write_bytes(save(weights))
        (folder / CONFIG_NAME).write_text(json.dumps(self.config, indent=2) + "\n")

    @staticmethod
    def from_pretrained(folder: Path) -> SceneNetwork:
        """Load, in float32 and frozen; FileNotFoundError where the folder holds none."""
        if not (folder / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(f"no scene network at {folder}; `make tiny-weights` trains it")
        network = SceneNetwork(**json.loads((folder / CONFIG_NAME).read_text()))
        network.load_state_dict({name: value.float() for name, value in load_file(folder / WEIGHTS_NAME).items()})
        return network.requires_grad_(False).eval()


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
