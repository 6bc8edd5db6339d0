"""The study's report: preferences, drawn as in Fig. 13 (arXiv:2406.14539), and how far assessors agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from icd_lightning.apps.study.analysis import Panelists, Preference, judge, preferences
from icd_lightning.apps.study.store import Store
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
from icd_lightning.evaluation.statistics import RESAMPLES, Estimate
from icd_lightning.files import write_text, write_whole

PER_CENT = Style(1, factor=100)
STYLES = {**dict.fromkeys(("a preferred", "a better", "tie", "b better"), PER_CENT), "alpha": Style(2)}
NOTE = (
    "Shares of votes, each pair of edits weighing the same; in 'a preferred' a tie is half a vote for each. ± is half "
    f"of a 95 % interval over {RESAMPLES:,} resamples of pairs. alpha is Krippendorff's: how far assessors agree, 0 "
    "being chance."
)


@dataclass(frozen=True)
class Outcome:
    """What a study came to: its settings, its pairs of edits and how many lack votes, assessors, preferences."""

    settings: dict[str, str]
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
            f"fewer than {self.settings['votes']} votes."
        )


def evaluate(folder: Path, min_passed: float) -> Outcome:
    """Count a study's votes; ValueError if there are none to count."""
    if not 0 <= min_passed <= 1:
        raise ValueError(f"min_passed {min_passed} must be from 0 to 1")
    store = Store(folder)
    votes, settings = store.votes(), store.settings
    ((pairs,),) = store.read("SELECT count(*) FROM tasks WHERE b IS NOT NULL")
    store.close()
    panelists = judge(votes, min_passed)
    counted = votes[votes.assessor.isin(panelists.counted) & votes.b.notna()]
    if counted.empty:
        raise ValueError(
            f"{folder} has no votes to count: {len(panelists.failed)} assessors failed the checks, and "
            f"{len(panelists.unchecked)} met none; collect more by icd study serve, or lower --min-passed"
        )
    whole = (counted.groupby("task").size() >= int(settings["votes"])).sum()
    return Outcome(settings, pairs, pairs - int(whole), len(counted), panelists, list(preferences(counted)))


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
    report = Report("Preference study", outcome.settings["title"], tiles, (figure, *tables), facts)
    return [markdown, sheet, draw_section(figure, out / "preferences.png"), *write_report(report, out)]
