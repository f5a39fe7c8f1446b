"""Confidence intervals resample subjects, and no NaN is written."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from adni_ldm.evaluation.estimates import (
    Criterion,
    Estimate,
    Resamples,
    clustered_proportion,
    decide,
    difference_of_proportions,
    estimate,
    proportion,
    roc_auc,
    unknown,
)


def test_subjects_are_resampled_as_a_whole():
    """Ten identical slices per subject are no more informative than one."""
    values = np.random.default_rng(0).normal(size=40)
    once = estimate(Resamples.draw(range(40), seed=1).mean(values))
    tenfold, subjects = np.repeat(values, 10), np.repeat([f"s{index:02d}" for index in range(40)], 10)
    by_subject = estimate(Resamples.draw(subjects, seed=1).mean(tenfold))
    by_slice = estimate(Resamples.draw(range(400), seed=1).mean(tenfold))
    assert (by_subject.low, by_subject.high) == pytest.approx((once.low, once.high))
    assert by_slice.high - by_slice.low < 0.5 * (once.high - once.low)


def test_a_resampled_statistic_is_that_of_the_repeated_rows():
    """Sums by weights equal the statistic of the rows themselves; the first is that of the data."""
    rng = np.random.default_rng(0)
    values, subjects = rng.normal(5, 1, 30), np.repeat(np.arange(10), 3)
    resamples = Resamples.draw(subjects, 20, seed=3)
    rows = list(resamples.rows())
    assert (rows[0] == np.arange(30)).all() and len({tuple(one) for one in rows}) > 15
    assert np.allclose(resamples.mean(values), [values[one].mean() for one in rows])
    assert np.allclose(resamples.deviation(values), [values[one].std(ddof=1) for one in rows])


def test_the_intervals_have_their_nominal_coverage():
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for trial in range(200):
        found = estimate(Resamples.draw(range(50), 300, trial).mean(rng.normal(size=50)))
        covered += found.low <= 0 <= found.high, found.low_90 <= 0 <= found.high_90
    assert 0.88 < covered[0] / 200 < 0.99 and 0.82 < covered[1] / 200 < 0.96
    assert covered[1] < covered[0]


def test_a_criterion_is_met_inside_the_limits_and_not_met_outside():
    def criterion(low, high, **options):
        return Criterion("ratio", Estimate((low + high) / 2, low_90=low, high_90=high), 0.7, 1.4, **options)

    assert criterion(0.8, 1.3).met is True and criterion(0.3, 0.6).met is False
    assert criterion(1.5, 1.9).met is False and criterion(0.6, 1.2).met is None
    assert Criterion("ratio", unknown("too few"), 0.7, 1.4).met is None
    assert decide([criterion(0.8, 1.3), criterion(0.6, 1.2)]) is None
    assert decide([criterion(0.8, 1.3), criterion(0.6, 1.2, required=False)]) is True
    assert decide([criterion(0.6, 1.2), criterion(0.3, 0.6, required=False)]) is False
    assert criterion(0.6, 1.4).more_data == pytest.approx((0.4 / 0.3) ** 2), "half the width: a quarter"
    assert "limits 0.7 to 1.4" in str(criterion(0.6, 1.2))


def test_a_clustered_proportion_has_the_width_of_its_subjects():
    """Rows that are the same within a subject count once."""
    by_subject = np.random.default_rng(0).random(50) < 0.2
    once = proportion(int(by_subject.sum()), 50)
    tenfold = clustered_proportion(np.repeat(by_subject, 10), np.repeat(np.arange(50), 10))
    assert tenfold.value == once.value
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high), abs=0.005)


def test_a_difference_of_proportions_has_newcombes_interval():
    """Newcombe 1998, table II: 56 of 70 less 48 of 80 has 0.0524 to 0.3339."""
    found = difference_of_proportions(proportion(56, 70), proportion(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_a_proportion_has_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 has 0.2553 to 0.3662."""
    share = proportion(81, 263)
    assert (share.low, share.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert proportion(0, 0).value is None


def test_nan_and_infinity_become_missing_values():
    assert Estimate(float("nan"), float("inf"), 2.0).to_json() == {"value": None, "high": 2.0}
    assert unknown("too few").to_json() == {"value": None, "note": "too few"}
    assert estimate(Resamples.draw([], 10).mean(np.zeros(0))).value is None


@pytest.mark.parametrize("decimals", [1, 8], ids=["with ties", "without ties"])
def test_auc_is_that_of_sklearn(decimals):
    rng = np.random.default_rng(0)
    cases, others = rng.normal(0.5, 1, 30).round(decimals), rng.normal(size=50).round(decimals)
    expected = roc_auc_score(np.repeat([1, 0], [30, 50]), np.concatenate([cases, others]))
    assert roc_auc(cases, others) == pytest.approx(expected, abs=1e-12)
    assert roc_auc(others + 9, others) == 1 and roc_auc(others, others) == 0.5
    assert np.isnan(roc_auc(cases, others[:0]))
