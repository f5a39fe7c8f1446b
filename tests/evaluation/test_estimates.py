"""Confidence intervals resample subjects, and no NaN is written."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from adni_ldm.evaluation.estimates import Estimate, bootstrap, proportion, roc_auc, unknown


def test_subjects_are_resampled_as_a_whole():
    """Ten identical slices per subject are no more informative than one."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    once = bootstrap(lambda rows: values[rows].mean(), range(40), seed=1)
    tenfold = np.repeat(values, 10)
    subjects = np.repeat([f"s{index:02d}" for index in range(40)], 10)
    by_subject = bootstrap(lambda rows: tenfold[rows].mean(), subjects, seed=1)
    by_slice = bootstrap(lambda rows: tenfold[rows].mean(), range(400), seed=1)
    assert by_subject == pytest.approx(once)
    assert by_slice[1] - by_slice[0] < 0.5 * (once[1] - once[0])


def test_the_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = rng.normal(size=50)
        low, high = bootstrap(
            lambda rows, values=values: values[rows].mean(), range(50), count=300, seed=trial
        )
        covered += low <= 0 <= high
    assert 0.88 < covered / 200 < 0.99


def test_a_proportion_has_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 has 0.2553 to 0.3662."""
    share = proportion(81, 263)
    assert (share.low, share.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert proportion(0, 0).value is None


def test_nan_and_infinity_become_missing_values():
    assert Estimate(float("nan"), float("inf"), 2.0).to_json() == {"value": None, "high": 2.0}
    assert unknown("too few").to_json() == {"value": None, "note": "too few"}
    assert np.isnan(bootstrap(lambda rows: 1.0, [])).all()


@pytest.mark.parametrize("decimals", [1, 8], ids=["with ties", "without ties"])
def test_auc_is_that_of_sklearn(decimals):
    rng = np.random.default_rng(0)
    cases, others = rng.normal(0.5, 1, 30).round(decimals), rng.normal(size=50).round(decimals)
    expected = roc_auc_score(np.repeat([1, 0], [30, 50]), np.concatenate([cases, others]))
    assert roc_auc(cases, others) == pytest.approx(expected, abs=1e-12)
    assert roc_auc(others + 9, others) == 1 and roc_auc(others, others) == 0.5
    assert np.isnan(roc_auc(cases, others[:0]))
