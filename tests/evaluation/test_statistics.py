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


def test_the_same_values_give_the_same_interval():
    values = np.arange(10.0)
    first, second = bootstrap(values), bootstrap(values)
    assert (first.low, first.high) == (second.low, second.high)


def test_equal_values_leave_no_doubt_and_pictures_without_a_value_do_not_count():
    estimate = bootstrap([2.0, math.nan, 2.0])
    assert (estimate, estimate.low, estimate.high) == (2.0, 2.0, 2.0)


def test_perfect_pictures_have_an_infinite_mean_and_no_nan():
    estimate = bootstrap([math.inf, 30.0])
    assert (estimate, estimate.low, estimate.high) == (math.inf, 30.0, math.inf)


def test_one_picture_has_no_interval():
    estimate = bootstrap([27.5])
    assert f"{estimate:.1f}" == "27.5"
    assert estimate.as_dict() == {"mean": 27.5, "low": None, "high": None}


def test_no_value_at_all_is_an_error():
    with pytest.raises(ValueError, match="no value to average"):
        bootstrap([math.nan])


def test_an_estimate_is_a_number_that_shows_its_interval():
    estimate = Estimate(27.5, 27.0, 28.5)
    assert f"{estimate:.2f}" == "27.50 ± 0.75"
    assert f"{estimate.scaled(100):.0f}" == "2750 ± 75"
    assert estimate.as_dict() == {"mean": 27.5, "low": 27.0, "high": 28.5}


def test_a_difference_in_every_picture_is_found_however_much_pictures_differ():
    pictures = np.random.default_rng(0).normal(20.0, 5.0, 50)  # far more spread than the difference
    verdict = compare("A", "B", {"A": [pictures, pictures], "B": [pictures + 0.3, pictures + 0.1]})
    assert verdict.word == "found"
    assert verdict.difference == pytest.approx(0.2)
    assert (verdict.seeds_agreeing, verdict.seeds) == (2, 2)
    assert compare("B", "A", {"A": [pictures], "B": [pictures + 0.3]}).word == "reversed"


def test_a_difference_that_chance_explains_is_undecided():
    random = np.random.default_rng(1)
    values = {"A": [random.normal(0, 1, 30)], "B": [random.normal(0, 1, 30)]}
    assert compare("A", "B", values).word == "undecided"


def test_a_seed_that_disagrees_is_counted():
    pictures = np.zeros(20)
    verdict = compare("A", "B", {"A": [pictures] * 3, "B": [pictures + 3, pictures + 3, pictures - 1]})
    assert (verdict.word, verdict.seeds_agreeing, verdict.seeds) == ("found", 2, 3)


def test_rows_over_different_pictures_are_not_compared():
    with pytest.raises(ValueError, match="A and B differ in seeds or pictures"):
        compare("A", "B", {"A": [np.zeros(3)], "B": [np.zeros(4)]})
