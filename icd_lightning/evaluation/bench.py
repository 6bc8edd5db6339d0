"""A method at work on a batch of examples: what it is given, what it costs, what comes out of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from icd_lightning.diffusion import Step
from icd_lightning.editing.method import PictureMethod
from icd_lightning.evaluation.decodings import Decoding
from icd_lightning.evaluation.examples import Example, stack

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Outcome:
    """Results (B, 3, R, R) of one decoding; evaluations and seconds of one picture, and further `values` (B,)."""

    decoding: str
    images: Tensor
    nfe: int
    seconds: float
    values: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Clock:
    """Counts evaluations and seconds since it was made; `count` is what methods take as `on_step`."""

    device: torch.device
    nfe: int = 0

    def __post_init__(self) -> None:
        self.start = self._now()

    def count(self, step: Step) -> None:
        """Add the evaluations of one step."""
        self.nfe += step.nfe

    def seconds(self) -> float:
        """Passed so far, with all work of a GPU done."""
        return self._now() - self.start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Bench:
    """A method at its resolution, on its device, with the seed of the run."""

    method: PictureMethod
    resolution: int
    seed: int = 0
    device: torch.device = field(default=CPU)

    def images(self, batch: Sequence[Example]) -> Tensor:
        """The batch's pictures (B, 3, R, R)."""
        return stack(batch, self.resolution).to(self.device)

    def seeds(self, batch: Sequence[Example]) -> list[int]:
        """The examples' seeds."""
        return [example.seed(self.seed) for example in batch]


Measure = Callable[[Bench, Sequence[Example], Sequence[Decoding]], Iterator[Outcome]]
"""What a benchmark does with a batch: an `Outcome` for each decoding, what they share being done once."""
