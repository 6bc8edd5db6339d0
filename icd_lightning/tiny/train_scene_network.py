"""Training of the network that reads pictures of the tiny world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from icd_lightning.data.batch import Batch
from icd_lightning.tasks.base import OptimizerSettings, Task
from icd_lightning.tiny.scene_network import SceneNetwork, attribute_accuracy, label_tensor
from icd_lightning.tiny.scenes import ABSENT, Scene


class SceneNetworkTraining(Task):
    """The sum of one cross entropy an attribute; pictures get a little noise, since decoded latents are not clean.

    Args:
        channels: see `SceneNetwork`.
        feature_dim: see `SceneNetwork`.
        image_noise: standard deviation of the noise added to pictures in [-1, 1].
    """

    def __init__(
        self,
        channels: Sequence[int] = (24, 48, 96, 128),
        feature_dim: int = 256,
        *,
        image_noise: float = 0.05,
        optimizer: OptimizerSettings = OptimizerSettings(),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, seed)
        torch.manual_seed(seed)
        self.network = SceneNetwork(tuple(channels), feature_dim)
        self.image_noise = image_noise

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = batch.images + self.image_noise * self.draws().normal(*batch.images.shape)
        truth = scene_labels(batch.metadata).to(self.device)
        losses = {
            name: cross_entropy(logits, truth[:, i], ignore_index=ABSENT)
            for i, (name, logits) in enumerate(self.network(images).items())
            if (truth[:, i] != ABSENT).any()
        }
        total = torch.stack(list(losses.values())).sum()
        self.log_losses(total, losses)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        accuracy = attribute_accuracy(self.network.read(batch.images), scene_labels(batch.metadata).to(self.device))
        self.log_dict({f"val/{name}": value for name, value in accuracy.items()}, sync_dist=True, prog_bar=True)

    def export(self, folder: Path) -> None:
        self.network.save_pretrained(folder / "scene_network")


def scene_labels(metadata: Sequence[dict]) -> Tensor:
    """Labels of the scenes that a batch's metadata describe, long (B, len(LABELS))."""
    return label_tensor([Scene.from_dict(values) for values in metadata])
