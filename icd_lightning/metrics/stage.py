"""A metric as a stage of curation: CLIP's score, ImageReward, or any other of one picture and its caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from icd_lightning.data.curation.stages import Stage
from icd_lightning.data.decoding import Sample
from icd_lightning.data.images import resize_and_crop, to_images

if TYPE_CHECKING:
    from icd_lightning.metrics.base import PerImage


@dataclass(frozen=True, kw_only=True)
class Metric(Stage):
    """The value of a metric of pictures alone or of pictures and prompts, e.g. clip-t, image-reward.

    It is computed on the GPU if a worker has one. Pictures are brought to `side` x `side` pixels, centres cut out, 224
    being what CLIP sees.
    """

    metric: str = "clip-t"
    side: int = 224

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"side {self.side} must be at least 1")
        super().__post_init__()

    @property
    def name(self) -> str:
        return self.reason or self.metric.rpartition(".")[2].replace("-", "_").lower()

    @cached_property
    def network(self) -> PerImage:
        """The metric, once a process; ValueError for one that needs more than a picture and its caption."""
        from icd_lightning.metrics.base import PerImage
        from icd_lightning.metrics.registry import build_metrics

        metric = build_metrics([self.metric])[self.metric]
        if not (isinstance(metric, PerImage) and {"images"} <= set(metric.needs) <= {"images", "prompts"}):
            raise ValueError(f"metric {self.metric!r} is not of one picture and its caption: take clip-t, image-reward")
        return metric.to("cuda" if torch.cuda.is_available() else "cpu")

    def values(self, samples: Sequence[Sample]) -> Sequence[float]:
        squares = [np.asarray(resize_and_crop(sample.picture, self.side)[0]) for sample in samples]
        images = to_images(squares).to(self.network.device)
        return self.network.per_image(images, prompts=[sample.caption for sample in samples]).tolist()

    def __getstate__(self) -> dict:
        """Without the network: each process loads its own."""
        return {name: value for name, value in self.__dict__.items() if name != "network"}
