"""What votes say: who is counted, how often one method is preferred over another, how far assessors agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from icd_lightning.evaluation.results import ALL
from icd_lightning.evaluation.statistics import Estimate, bootstrap

CHOICES = ("a", "tie", "b")


@dataclass(frozen=True)
class Panelists:
    """Assessors by what became of their votes."""

    counted: frozenset[str]
    failed: frozenset[str]
    unchecked: frozenset[str]


def judge(votes: pd.DataFrame, min_passed: float) -> Panelists:
    """Count whoever passes at least this share of the checks they answered; nobody without one, if there are any.

    A check is passed by choosing the edit; a tie fails it.
    """
    everybody, checks = frozenset(votes.assessor), votes[votes.b.isna()]
    if checks.empty:
        return Panelists(everybody, frozenset(), frozenset())
    passed = (checks.choice == "a").groupby(checks.assessor).mean()
    counted, checked = frozenset(passed.index[passed >= min_passed]), frozenset(passed.index)
    return Panelists(counted, checked - counted, everybody - checked)


@dataclass(frozen=True)
class Preference:
    """How votes on a's edits beside b's came out, as shares with intervals; a tie is half a preference for each."""

    benchmark: str
    kind: str
    a: str
    b: str
    preferred: Estimate
    won: Estimate
    tied: Estimate
    lost: Estimate
    alpha: float
    pairs: int
    votes: int

    @classmethod
    def of(cls, votes: pd.DataFrame, benchmark: str, kind: str) -> Preference:
        """Of votes on one pair of methods. Each pair of edits weighs the same; intervals resample them."""
        counts = pd.crosstab(votes.task, votes.choice).reindex(columns=list(CHOICES), fill_value=0)
        won, tied, lost = (counts.to_numpy() / counts.sum(axis=1).to_numpy()[:, None]).T
        estimates = map(bootstrap, (won + tied / 2, won, tied, lost))
        a, b = votes.iloc[0][["a", "b"]]
        return cls(benchmark, kind, a, b, *estimates, krippendorff_alpha(counts), len(counts), len(votes))


def preferences(votes: pd.DataFrame) -> Iterator[Preference]:
    """Of each two methods: over all benchmarks, where there are several, by benchmark, and by its types of edits."""
    for _, of_pair in votes.groupby(["a", "b"]):
        if of_pair.benchmark.nunique() > 1:
            yield Preference.of(of_pair, ALL, ALL)
        for benchmark, of_benchmark in of_pair.groupby("benchmark"):
            yield Preference.of(of_benchmark, benchmark, ALL)
            for kind, of_kind in of_benchmark.groupby("kind"):
                if kind:
                    yield Preference.of(of_kind, benchmark, kind)


def krippendorff_alpha(counts: ArrayLike) -> float:
    """Agreement on unordered categories from counts (units, categories): 1 is perfect, 0 that of chance.

    Krippendorff, Content Analysis, chapter on reliability. Units with one value tell nothing. NaN where nothing could
    differ: of fewer than two categories.
    """
    table = np.asarray(counts, dtype=float)
    table = table[table.sum(1) >= 2]
    values, total = table.sum(1), table.sum()
    expected = total**2 - (table.sum(0) ** 2).sum()
    if not expected > 0:
        return math.nan
    observed = ((values**2 - (table**2).sum(1)) / (values - 1)).sum()
    return float(1 - (total - 1) * observed / expected)
