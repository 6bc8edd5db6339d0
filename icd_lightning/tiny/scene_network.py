"""A small network that reads pictures of the tiny world: what is where, in which colour, shape, size and texture.

It judges generated and edited pictures (attribute accuracy), and its features serve distances of their own names. It is
not Inception, CLIP or DINO, and its figures are comparable with nothing but each other.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from icd_lightning.tiny.scenes import LABELS

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
