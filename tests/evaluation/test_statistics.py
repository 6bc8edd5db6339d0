"""Bootstrap intervals against what statistics says, and verdicts on orderings that are known."""

import math

import numpy as np
import pytest

from icd_lightning.evaluation.statistics import Estimate, bootstrap, compare


def test_the_interval_is_that_of_the_mean_of_normal_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_pictures_without_a_value_do_not_count_and_perfect_ones_give_no_nan():
    estimate = bootstrap([2.0, math.nan, 2.0])
    assert (estimate, estimate.low, estimate.high) == (2.0, 2.0, 2.0)
    estimate = bootstrap([math.inf, 30.0])
    assert (estimate, estimate.low, estimate.high) == (math.inf, 30.0, math.inf)
    with pytest.raises(ValueError, match="no value to average"):
        bootstrap([math.nan])


def test_an_estimate_is_a_number_that_shows_its_interval():
    estimate = Estimate(27.5, 27.0, 28.5)
    assert f"{estimate:.2f}" == "27.50 ± 0.75"
    assert f"{estimate.scaled(100):.0f}" == "2750 ± 75"
    assert f"{bootstrap([27.5]):.1f}" == "27.5"  # of one picture: no interval
    assert bootstrap([27.5]).as_dict() == {"mean": 27.5, "low": None, "high": None}


def test_a_difference_in_every_picture_is_found_however_much_pictures_differ():
    pictures = np.random.default_rng(0).normal(20.0, 5.0, 50)  # far more spread than the difference
    verdict = compare("A", "B", {"A": [pictures, pictures], "B": [pictures + 0.3, pictures + 0.1]})
    assert verdict.word == "found"
    assert verdict.difference == pytest.approx(0.2)
    assert (verdict.seeds_agreeing, verdict.seeds) == (2, 2)
    assert compare("B", "A", {"A": [pictures], "B": [pictures + 0.3]}).word == "reversed"


def test_three_trainings_that_differ_by_chance_seldom_give_a_verdict():
    random, verdicts = np.random.default_rng(0), []
    for _ in range(300):
        pictures = random.normal(30, 4, 64)
        row = {name: [pictures + random.normal(0, 0.1) + random.normal(0, 0.2, 64) for _ in range(3)] for name in "AB"}
        verdicts.append(compare("A", "B", row).word)
    assert verdicts.count("undecided") >= 0.92 * len(verdicts)  # by resampled pictures alone: 31 %


def test_a_difference_beyond_the_scatter_of_trainings_is_found():
    random = np.random.default_rng(0)
    pictures = random.normal(30, 4, 64)
    values = {
        name: [pictures + level + random.normal(0, 0.1) for _ in range(4)] for name, level in (("A", 0), ("B", 1))
    }
    assert compare("A", "B", values).word == "found"
    values["B"][3] = pictures - 1  # one training of four disagrees
    assert compare("A", "B", values)[3:] == (3, 4)
    assert compare("A", "B", values).word == "undecided"


def test_rows_over_different_pictures_are_not_compared():
    with pytest.raises(ValueError, match="A and B differ in seeds or pictures"):
        compare("A", "B", {"A": [np.zeros(3)], "B": [np.zeros(4)]})
