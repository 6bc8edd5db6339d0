"""Bootstrap intervals against what statistics says."""

import math

import numpy as np
import pytest

from icd_lightning.evaluation.statistics import Estimate, bootstrap, bootstrap_trainings, percentiles


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


def test_trainings_that_differ_widen_the_interval_by_students_t():
    """Pictures that are alike leave the trainings' own scatter: t of two degrees of freedom, 4.30 at 97.5 %."""
    means = np.array([1.0, 2.0, 4.0])
    estimate = bootstrap_trainings(np.repeat(means[:, None], 50, axis=1))
    half = 4.303 * means.std(ddof=1) / math.sqrt(3)
    assert estimate == pytest.approx(means.mean())
    assert (estimate.low, estimate.high) == pytest.approx((means.mean() - half, means.mean() + half), abs=half / 30)
    alike = bootstrap_trainings(np.tile(np.random.default_rng(0).normal(size=200), (3, 1)))
    assert (alike.high - alike.low) / 2 == pytest.approx(1.96 / math.sqrt(200), rel=0.15)


def test_percentiles_are_as_uncertain_as_those_of_normal_values():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    least, median, most = percentiles(values, [0, 50, 100])
    assert (least, median, most) == (values.min(), np.median(values), values.max())
    half = 1.96 * 1.2533 * 2.0 / math.sqrt(len(values))  # the deviation of a median
    assert (median.high - median.low) / 2 == pytest.approx(half, rel=0.2)


@pytest.mark.parametrize("trainings", [2, 3])
def test_a_picture_that_one_training_has_no_value_for_does_not_count_for_any(trainings):
    values = np.random.default_rng(0).normal(size=(trainings, 20))
    holed = np.insert(values, 7, 100.0, axis=1)
    holed[1, 7] = math.nan
    assert bootstrap_trainings(holed).as_dict() == bootstrap_trainings(values).as_dict()


def test_an_estimate_is_a_number_that_shows_its_interval():
    estimate = Estimate(27.5, 27.0, 28.5)
    assert f"{estimate:.2f}" == "27.50 ± 0.75"
    assert f"{estimate * 100:.0f}" == "2750 ± 75"
    assert f"{bootstrap([27.5]):.1f}" == "27.5"  # of one picture: no interval
    assert bootstrap([27.5]).as_dict() == {"mean": 27.5, "low": None, "high": None}
