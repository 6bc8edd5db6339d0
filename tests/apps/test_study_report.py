"""icd study report: figures from votes whose outcome is known by hand."""

import csv
import math
from random import Random

import pandas as pd
import pytest
from study_case import make_study, told

from icd_lightning.apps.study.report import judge, krippendorff_alpha, preferences
from icd_lightning.apps.study.store import Store
from icd_lightning.commands.main import main

WIKIPEDIA = """
* * * * * 3 4 1 2 1 1 3 3 * 3
1 * 2 1 3 3 4 3 * * * * * * *
* * 2 1 3 4 4 * 2 1 1 3 3 * 4
"""
"""Three coders, fifteen units, the example of the article on Krippendorff's alpha, where nominal alpha is 0.691."""


def votes_of(*rows, benchmark="piebench", kind=""):
    """Rows of assessor, task and choice, of methods x and y; a task that begins with "check" is a check."""
    columns = ["assessor", "task", "choice"]
    frame = pd.DataFrame([row.split() for row in rows], columns=columns)
    checks = frame.task.str.startswith("check")
    return frame.assign(benchmark=benchmark, kind=kind, a="x", b=[None if check else "y" for check in checks])


def test_alpha_is_that_of_the_published_example():
    coders = [line.split() for line in WIKIPEDIA.strip().splitlines()]
    counts = [[unit.count(value) for value in "1234"] for unit in zip(*coders, strict=True)]
    assert krippendorff_alpha(counts) == pytest.approx(0.691, abs=5e-4)


@pytest.mark.parametrize(
    ("counts", "alpha"),
    [
        ([[2, 0], [0, 2]], 1.0),
        ([[1, 1], [1, 1]], -0.5),  # 1 - 3 * (2 + 2) / (16 - 8)
        ([[2, 0], [1, 1], [0, 2]], 1 - 5 * 2 / 18),
        ([[2, 0], [0, 2], [1, 0], [0, 0]], 1.0),  # units with one value or none tell nothing
    ],
)
def test_alpha_is_as_computed_by_hand(counts, alpha):
    assert krippendorff_alpha(counts) == pytest.approx(alpha)


@pytest.mark.parametrize("counts", [[[2, 0], [3, 0]], [[1, 0], [0, 1]]])
def test_alpha_means_nothing_where_nothing_could_differ(counts):
    assert math.isnan(krippendorff_alpha(counts))


def test_who_fails_checks_is_left_out():
    votes = votes_of(
        *("good check1 a", "good check2 a", "good check3 a", "good check4 b", "good t1 a"),
        *("bad check1 a", "bad check2 tie", "bad t1 b", "new t1 b"),
    )
    people = judge(votes, 0.75)
    assert (people.counted, people.failed, people.unchecked) == ({"good"}, {"bad"}, {"new"})
    assert judge(votes, 0.5).counted == {"good", "bad"}
    assert judge(votes[votes.b.notna()], 0.75).counted == {"good", "bad", "new"}  # a study without checks


def test_each_pair_weighs_the_same_and_ties_are_halves():
    votes = votes_of("p t1 a", "q t1 a", "r t1 b", "s t1 tie", "p t2 b", "p t3 tie")
    (one,) = preferences(votes)
    assert (one.a, one.b, one.benchmark, one.pairs, one.votes) == ("x", "y", "piebench", 3, 6)
    assert (one.won, one.tied, one.lost) == pytest.approx((0.5 / 3, 1.25 / 3, 1.25 / 3))
    assert one.preferred == pytest.approx((0.625 + 0 + 0.5) / 3)
    assert one.preferred.low <= one.preferred <= one.preferred.high


def test_preferences_come_over_all_by_benchmark_and_by_type():
    votes = pd.concat(
        [
            votes_of("p t1 a", "p t2 a", kind="add"),
            votes_of("p t3 b", kind="style"),
            votes_of("p t4 b", benchmark="coco_edit"),
        ]
    )
    found = {(one.benchmark, one.kind): float(one.won) for one in preferences(votes)}
    assert found == {
        ("all", "all"): 0.5,
        ("piebench", "all"): pytest.approx(2 / 3),
        ("piebench", "add"): 1.0,
        ("piebench", "style"): 0.0,
        ("coco_edit", "all"): 0.0,
    }


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """95 %: of 60 draws of 40 pairs with three votes each, few miss the share that made them."""
    rng, missed = Random(0), 0
    for _ in range(60):
        rows = [f"p{i} t{j} {rng.choices(('a', 'tie', 'b'), (6, 1, 3))[0]}" for j in range(40) for i in range(3)]
        (one,) = preferences(votes_of(*rows))
        missed += not one.preferred.low <= 0.65 <= one.preferred.high
    assert 0 < missed < 9


@pytest.fixture
def voted(tmp_path):
    """A study in which one assessor answered all."""
    study = make_study(tmp_path, 4, votes=2, check_share=0.2)
    store = Store(study)
    token = store.join()
    while shown := store.next_task(token):
        ((b,),) = store.read("SELECT b FROM tasks WHERE id = ?", shown.task)
        ((swapped,),) = store.read("SELECT swapped FROM votes WHERE task = ?", shown.task)
        store.vote(token, shown.task, "tie" if b and shown.number % 2 else "right" if swapped else "left")
    store.close()
    return study, token


def test_a_report_is_written_whole(voted, tmp_path, capsys):
    study, token = voted
    main(["study", "report", str(study)])
    files = {file.name: file for file in (study / "report").iterdir()}
    assert set(files) == {"preferences.md", "preferences.csv", "preferences.png", "report.html", "report.png"}
    store = Store(study)
    ties = int((store.votes().choice == "tie").sum())
    store.close()
    with files["preferences.csv"].open() as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["benchmark"], row["kind"]) for row in rows] == [("edits", kind) for kind in ("all", "add", "recolour")]
    assert (rows[0]["a"], rows[0]["b"], rows[0]["pairs"]) == ("method-ours", "method-theirs", "4")
    assert float(rows[0]["tied_mean"]) == ties / 4
    assert float(rows[0]["won_mean"]) == 1 - ties / 4
    page, tables = files["report.html"].read_text(), files["preferences.md"].read_text()
    for text in (page, tables):
        assert "4 votes of 1 assessors are counted; 0 who failed the checks and 0 who met none are left out." in text
        assert "4 of 4 pairs have fewer than 2 votes." in text
        assert token not in text
    assert "Which edit is better" in page
    assert f'style="width: {100 * (1 - ties / 4)}%" title="first is better: {100 * (1 - ties / 4):.1f} %"' in page
    assert "Preferences by type of edit" in tables
    assert "4 votes of 1 assessors" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["-0.1", "1.5", "75"])
def test_a_share_that_cannot_be_is_refused(voted, capsys, value):
    assert f"min_passed {float(value)} must be from 0 to 1" in told(capsys, "report", voted[0], f"--min-passed={value}")


def test_without_votes_to_count_it_is_said_why(tmp_path, capsys):
    study = make_study(tmp_path, 3, check_share=0.5)
    complaint = "has no votes to count: {} assessors failed the checks, and 0 met none; collect more by icd study serve"
    assert complaint.format(0) in told(capsys, "report", study)
    store = Store(study)
    token = store.join()
    while shown := store.next_task(token):
        store.vote(token, shown.task, "tie")
    store.close()
    assert complaint.format(1) in told(capsys, "report", study)
    assert not (study / "report").exists()
    main(["study", "report", str(study), "--min-passed", "0"])  # the remedy
    assert (study / "report" / "report.html").is_file()
