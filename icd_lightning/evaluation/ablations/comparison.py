"""A row of Table 2, and two of them compared: the verdict on their order, and what tells them apart in each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from icd_lightning.evaluation.runs import Results
from icd_lightning.evaluation.statistics import Estimate, bootstrap, bootstrap_trainings


@dataclass(frozen=True)
class Row:
    """A run for each training, under one decoding; `part` is what it adds to the row before it in an ordering."""

    name: str
    description: str
    decoding: str
    runs: Sequence[Results]
    part: str = ""

    def values(self, column: str = "psnr") -> np.ndarray:
        """A column, (trainings, pictures)."""
        return np.array([run.values(column, self.decoding) for run in self.runs])

    def pictures(self, column: str = "psnr") -> np.ndarray:
        """A column's means over trainings, (pictures,)."""
        return self.values(column).mean(0)


@dataclass(frozen=True)
class Comparison:
    """Whether `better` really is above `worse` in PSNR, over the same pictures; `where` says how both are decoded.

    The difference's interval is over resampled pictures and, with MIN_SEEDS or more, over trainings as well; with fewer
    the verdict is of these trainings only.
    """

    worse: Row
    better: Row
    where: str = ""

    @property
    def rows(self) -> str:
        """Their letters."""
        return self.worse.name + self.better.name

    @cached_property
    def differences(self) -> np.ndarray:
        """(trainings, pictures)."""
        return self.better.values() - self.worse.values()

    @cached_property
    def difference(self) -> Estimate:
        return bootstrap_trainings(self.differences)

    @property
    def verdict(self) -> str:
        """found, reversed, or undecided where the interval of the difference holds 0."""
        if self.difference.low > 0:
            return "found"
        return "reversed" if self.difference.high < 0 else "undecided"

    @property
    def seeds_agreeing(self) -> int:
        """Trainings in which the better is above."""
        return int((self.differences.mean(1) > 0).sum())

    @cached_property
    def gain(self) -> np.ndarray:
        """Of each picture, the mean over trainings, (pictures,)."""
        return self.better.pictures() - self.worse.pictures()

    @property
    def keys(self) -> list[str]:
        """Of the pictures."""
        return self.worse.runs[0].of(self.worse.decoding).key.tolist()

    def extremes(self, count: int) -> list[str]:
        """Keys of the pictures that gain most, and then of those that gain least."""
        order = np.argsort(-self.gain, kind="stable")
        return [self.keys[i] for i in (*order[:count], *order[-count:])]

    def by_hardness(self, reference: np.ndarray, groups: int = 4) -> list[tuple[float, Estimate]]:
        """Mean gain of equal groups of pictures, from those whose `reference` (pictures,) is least, with its mean.

        The reference must not share noise with either side, as a row's own PSNR would: that alone would make what is
        low before gain most.
        """
        parts = np.array_split(np.argsort(reference, kind="stable"), min(groups, len(reference)))
        return [(float(reference[part].mean()), bootstrap(self.gain[part])) for part in parts]
