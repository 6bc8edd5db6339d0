"""Bootstrap intervals against what statistics says."""

import math

import numpy as np
import pytest

from icd_lightning.evaluation.statistics import Estimate, bootstrap


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
    assert f"{estimate * 100:.0f}" == "2750 ± 75"
    assert f"{bootstrap([27.5]):.1f}" == "27.5"  # of one picture: no interval
    assert bootstrap([27.5]).as_dict() == {"mean": 27.5, "low": None, "high": None}
