"""What a study's votes say: whose are counted, preferences, drawn as in Fig. 13 (arXiv:2406.14539), and agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from icd_lightning.apps.study.store import Plan, Store
from icd_lightning.evaluation.report import (
    Bars,
    Report,
    Style,
    Table,
    Value,
    draw_section,
    markdown_table,
    print_tables,
    write_report,
)
from icd_lightning.evaluation.results import ALL
from icd_lightning.evaluation.statistics import RESAMPLES, Estimate, bootstrap
from icd_lightning.files import write_text, write_whole

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


PER_CENT = Style(1, factor=100)
STYLES = {**dict.fromkeys(("a preferred", "a better", "tie", "b better"), PER_CENT), "alpha": Style(2)}
NOTE = (
    "Shares of votes, each pair of edits weighing the same; in 'a preferred' a tie is half a vote for each. ± is half "
    f"of a 95 % interval over {RESAMPLES:,} resamples of pairs. alpha is Krippendorff's: how far assessors agree, 0 "
    "being chance."
)


@dataclass(frozen=True)
class Outcome:
    """What a study came to: its plan, its pairs of edits and how many lack votes, assessors, preferences."""

    plan: Plan
    pairs: int
    short: int
    votes: int
    panelists: Panelists
    preferences: Sequence[Preference]

    @property
    def note(self) -> str:
        people = self.panelists
        return (
            f"{self.votes} votes of {len(people.counted)} assessors are counted; {len(people.failed)} who failed the "
            f"checks and {len(people.unchecked)} who met none are left out. {self.short} of {self.pairs} pairs have "
            f"fewer than {self.plan.votes} votes."
        )


def evaluate(folder: Path, min_passed: float) -> Outcome:
    """Count a study's votes; ValueError if there are none to count."""
    if not 0 <= min_passed <= 1:
        raise ValueError(f"min_passed {min_passed} must be from 0 to 1")
    store = Store(folder)
    votes, plan = store.votes(), store.plan
    ((pairs,),) = store.read("SELECT count(*) FROM tasks WHERE b IS NOT NULL")
    store.close()
    panelists = judge(votes, min_passed)
    counted = votes[votes.assessor.isin(panelists.counted) & votes.b.notna()]
    if counted.empty:
        raise ValueError(
            f"{folder} has no votes to count: {len(panelists.failed)} assessors failed the checks, and "
            f"{len(panelists.unchecked)} met none; collect more by icd study serve, or lower --min-passed"
        )
    whole = (counted.groupby("task").size() >= plan.votes).sum()
    return Outcome(plan, pairs, pairs - int(whole), len(counted), panelists, list(preferences(counted)))


def table(outcome: Outcome, *, by_kind: bool = False) -> Table:
    """A row for each two methods and benchmark, or for each type of edits."""
    rows = []
    for one in outcome.preferences:
        if (one.kind != ALL) == by_kind:
            figures: list[Value] = [one.preferred, one.won, one.tied, one.lost]
            alpha = None if math.isnan(one.alpha) else one.alpha
            where = f"{one.benchmark}: {one.kind}" if by_kind else one.benchmark
            rows.append((f"{one.a} vs. {one.b}", where, *figures, alpha, one.pairs, one.votes))
    title, where = ("Preferences by type of edit", "type") if by_kind else ("Preferences", "benchmark")
    header = ("a vs. b", where, "a preferred", "a better", "tie", "b better", "alpha", "pairs", "votes")
    return Table(title, NOTE if by_kind else f"{outcome.note} {NOTE}", header, tuple(rows), styles=STYLES)


def bars(outcome: Outcome) -> Bars:
    """Fig. 13: how often the one is better, the other, or neither."""
    rows = [
        (f"{one.a} vs. {one.b}\n{one.benchmark}", (float(one.won), float(one.tied), float(one.lost)))
        for one in outcome.preferences
        if one.kind == ALL
    ]
    note = "Edits side by side: how often that of the method named first is better, neither is, the second's is."
    return Bars("Which edit is better", note, ("first is better", "no difference", "second is better"), tuple(rows))


def numbers(preference: Preference) -> Iterator[tuple[str, object]]:
    """A preference's columns in the CSV, those of an estimate with its limits."""
    for name, value in vars(preference).items():
        if isinstance(value, Estimate):
            yield from ((f"{name}_{key}", limit) for key, limit in value.as_dict().items())
        else:
            yield name, value


def write_outcome(outcome: Outcome, out: Path, facts: dict[str, str]) -> list[Path]:
    """Print the tables; write them as Markdown and CSV, the figure, and the page; return their paths."""
    tables = [table(outcome), *([by_kind] if (by_kind := table(outcome, by_kind=True)).rows else [])]
    print_tables(tables[:1])
    markdown, sheet = out / "preferences.md", out / "preferences.csv"
    frame = pd.DataFrame([dict(numbers(one)) for one in outcome.preferences])
    write_text(markdown, "\n".join(map(markdown_table, tables)))
    write_whole(sheet, lambda temporary: frame.to_csv(temporary, index=False))
    figure = bars(outcome)
    people = outcome.panelists
    everybody = len(people.counted) + len(people.failed) + len(people.unchecked)
    tiles = (
        (f"{outcome.votes:,}", "votes counted"),
        (f"{len(people.counted)} of {everybody}", "assessors counted"),
        (f"{outcome.pairs:,}", "pairs of edits"),
    )
    report = Report("Preference study", outcome.plan.title, tiles, (figure, *tables), facts)
    return [markdown, sheet, draw_section(figure, out / "preferences.png"), *write_report(report, out)]
