"""Figures with their uncertainty: subjects are drawn whole, and no NaN is told."""

import numpy as np
import pytest

from adni_ldm.evaluation.estimates import Estimate, bootstrap, proportion, unknown


def test_subjects_are_drawn_whole():
    """Ten slices a subject that are all alike tell no more than one slice a subject."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    once = bootstrap(lambda rows: values[rows].mean(), range(40), seed=1)
    tenfold = np.repeat(values, 10)
    subjects = np.repeat([f"s{index:02d}" for index in range(40)], 10)
    by_subject = bootstrap(lambda rows: tenfold[rows].mean(), subjects, seed=1)
    by_slice = bootstrap(lambda rows: tenfold[rows].mean(), range(400), seed=1)
    assert by_subject == pytest.approx(once)
    assert by_slice[1] - by_slice[0] < 0.5 * (once[1] - once[0])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = rng.normal(size=50)
        low, high = bootstrap(lambda rows, drawn=values: drawn[rows].mean(), range(50), count=300, seed=trial)
        covered += low <= 0 <= high
    assert 0.88 < covered / 200 < 0.99


def test_a_share_has_wilsons_interval():
    """Newcombe 1998, table I: 81 of 263 has 0.2553 to 0.3662."""
    share = proportion(81, 263)
    assert (share.low, share.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert proportion(0, 0).value is None


def test_what_is_not_a_number_is_told_as_a_gap():
    assert Estimate(float("nan"), float("inf"), 2.0).to_json() == {"value": None, "high": 2.0}
    assert unknown("too few").to_json() == {"value": None, "note": "too few"}
    assert np.isnan(bootstrap(lambda rows: 1.0, [])).all()
