"""Conditions that samples were asked for: what they show, and the effect of the class at equal conditions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from discs import discs

from adni_ldm.evaluation.classifier import train_classifier
from adni_ldm.evaluation.covariates import (
    adjusted_effects,
    asked_against_seen,
    comparable,
    condition_faithfulness,
    describe_real,
    predictions,
    rows_of,
    subject_conditions,
    train_predictor,
)
from adni_ldm.evaluation.estimates import Resamples
from adni_ldm.evaluation.image_sets import ImageSet, join
from adni_ldm.evaluation.nearest_neighbors import nearest_in_pixels
from adni_ldm.evaluation.privacy import measure_memorization
from adni_ldm.evaluation.tstr import matched_auc, train_on_synthetic_test_on_real

ABOUT = {
    "age": {"mean": 70.0, "std": 8.0, "low": 55.0, "high": 90.0},
    "sex": {"categories": ["F", "M"]},
}


def cohort(subjects=40, slices=2, seed=0, slope=0.004, effect=0.05, gap=8.0):
    """Discs with a hole that widens with age and with the disease, whose patients are `gap` years older."""
    rng = np.random.default_rng(seed)
    parts = []
    for index in range(2 * subjects):
        label = index % 2  # 0: patients
        age, sex = rng.normal(70 + gap * (0.5 - label), 7), rng.choice(["F", "M"])
        hole = 0.12 + effect * (label == 0) + slope * (age - 70)
        one = discs(1, slices, seed=1000 * seed + index, holes=(hole, hole), classes=("AD",))
        conditions = {"age": np.full(len(one), f"{age:.1f}"), "sex": np.full(len(one), sex)}
        labels = np.full(len(one), label)
        subject = np.full(len(one), f"{seed}-{index}")
        parts.append(ImageSet(one.images, labels, subject, ("AD", "NC"), conditions))
    joined = parts[0]
    for part in parts[1:]:
        joined = join(joined, part)
    return joined


def hole_area(images: ImageSet) -> dict[str, np.ndarray]:
    dark = ((images.images < 100) & (images.images >= 0)).float()
    centre = dark[:, 0, 8:24, 8:24].sum((1, 2)).double().numpy()
    return {"ventricle_mm2": centre, "brain_mm2": centre}


def test_sets_keep_their_conditions_when_taken_and_joined():
    images = cohort(3)
    some = images.take(images.labels == 1)
    assert some.conditions["age"].tolist() == images.conditions["age"][images.labels == 1].tolist()
    both = join(some, replace(some, conditions={}))
    assert both.conditions["sex"].tolist() == [*some.conditions["sex"], *[""] * len(some)]


def test_columns_that_cannot_be_conditions_are_left_out():
    images = cohort(20)
    images = replace(images, conditions={**images.conditions, "site": np.full(len(images), "one")})
    assert list(describe_real(images)) == ["age", "sex"]


def test_comparable_slices_have_the_same_category_and_a_number_within_the_caliper():
    one = np.array([[70.0, 0.0], [np.nan, 1.0]])
    other = np.array([[71.9, 0.0], [72.1, 0.0], [70.0, 1.0], [70.0, np.nan]])
    assert comparable(one, other, ABOUT).tolist() == [[True, False, False, True], [False, False, True, True]]


def test_a_slope_is_that_of_the_predicted_value_on_the_one_asked_for():
    rng = np.random.default_rng(0)
    asked, seen = rng.normal(70, 8, 200), np.zeros(200)
    seen = 70 + 0.5 * (asked - 70) + rng.normal(0, 2, 200)
    asked[:20] = np.nan  # not asked for
    real = rng.normal(70, 8, 300)
    resamples = [Resamples.draw(range(count), 200, count) for count in (200, 300)]
    found = asked_against_seen((asked, seen, resamples[0]), (real, real.copy(), resamples[1]))
    known = ~np.isnan(asked)
    slope, _ = np.polyfit(asked[known], seen[known], 1)
    assert found["slope"].value == pytest.approx(slope) and found["slope"].reference == pytest.approx(1)
    assert found["slope_ratio"].value == pytest.approx(slope)
    assert found["slope"].low < 0.5 < found["slope"].high
    expected = np.corrcoef(asked[known], seen[known])[0, 1]
    assert found["correlation"].value == pytest.approx(expected)
    assert found["error"].value == pytest.approx(np.abs(seen - asked)[known].mean())
    nothing = asked_against_seen(
        (np.full(200, np.nan), seen, resamples[0]), (real, real.copy(), resamples[1])
    )
    assert nothing["slope_ratio"].value is None and "not asked" in nothing["slope_ratio"].note
    same = asked_against_seen((np.full(200, 75.0), seen, resamples[0]), (real, real.copy(), resamples[1]))
    assert "the same was asked for in these samples everywhere" in same["slope_ratio"].note


def test_a_category_has_the_balanced_accuracy():
    asked = np.repeat([0.0, 1.0], [90, 10])
    seen = asked.copy()
    seen[90:95] = 0  # half of the rare category is missed
    resamples = Resamples.draw(range(100), 100, 0)
    found = asked_against_seen((asked, seen, resamples), (asked, asked, resamples), categories=2)
    assert found["accuracy"].value == pytest.approx(0.75) and found["accuracy"].reference == 1
    # Of the categories that were asked for alone, in the reference too.
    three = np.where(np.arange(100) < 50, 2.0, asked)
    found = asked_against_seen((asked, seen, resamples), (three, three * 0, resamples), categories=3)
    assert found["accuracy"].value == pytest.approx(0.75) and found["accuracy"].reference == 0.5
    one = asked_against_seen((asked * 0, seen, resamples), (asked, asked, resamples), categories=2)
    assert "accuracy" not in one and "everywhere" in one["slope_ratio"].note


def test_a_network_reads_the_age_off_slices_and_misses_it_in_samples_that_ignore_it():
    train, held_out = cohort(60), cohort(20, seed=1)
    samples = cohort(30, seed=2)
    shuffled = np.random.default_rng(0).permutation(len(samples))
    ignoring = replace(samples, conditions={n: v[shuffled] for n, v in samples.conditions.items()})
    about = {"age": describe_real(train)["age"]}
    options = {"steps": 60, "draws": 100}
    good = condition_faithfulness(about, train, samples, held_out, **options)["age"]
    bad = condition_faithfulness(about, train, ignoring, held_out, **options)["age"]
    assert good["correlation"].value > 0.6 and good["correlation"].reference > 0.6
    assert 0.6 < good["slope_ratio"].value < 1.5
    assert abs(bad["slope_ratio"].value) < 0.4
    few = condition_faithfulness(about, train, samples.take(slice(4)), held_out, **options)["age"]
    assert few["slope_ratio"].value is None and "samples" in few["slope_ratio"].note


def test_a_predictor_has_outputs_for_numbers_and_categories_and_skips_missing_values():
    images = cohort(4)
    images.conditions["age"][:3] = ""
    model = train_predictor(ABOUT, images, steps=2)
    found = predictions(model, images, ABOUT)
    assert found.shape == (len(images), 2) and set(found[:, 1]) <= {0, 1}
    nothing = replace(images, conditions={})
    assert np.isnan(rows_of(nothing, ABOUT)).all()
    assert torch.isfinite(next(train_predictor(ABOUT, nothing, steps=2).parameters())).all()


def test_the_adjusted_effect_is_that_at_equal_age():
    """Patients are older, and age does what the disease does: adjusted, a third of the difference is left."""
    real = cohort(150, slices=1, gap=8.0)
    equal = cohort(150, slices=1, seed=5, gap=0.0)
    about = describe_real(real)
    found = adjusted_effects(about, real, hole_area(real), real, hole_area(real), draws=200)["ventricle_mm2"]
    at_equal_age = adjusted_effects(about, equal, hole_area(equal), equal, hole_area(equal), draws=200)
    truth = at_equal_age["ventricle_mm2"]["real_plain"].value
    assert found["real_plain"].value > 1.3 * truth
    assert found["real_adjusted"].value == pytest.approx(truth, rel=0.2)
    assert found["real_adjusted"].high < found["real_plain"].low
    assert found["adjusted_ratio"].value == pytest.approx(1)


def test_the_adjusted_effect_is_the_coefficient_of_least_squares():
    real = cohort(30)
    about = describe_real(real)
    values = hole_area(real)["ventricle_mm2"]
    z = (rows_of(real, about)[:, 0] - about["age"]["mean"]) / about["age"]["std"]
    patients, men = real.labels == 0, rows_of(real, about)[:, 1]
    design = np.column_stack([patients, z, z**2, men, np.ones(len(z))]).astype(float)
    expected = np.linalg.lstsq(design, values, rcond=None)[0][0]
    found = adjusted_effects(about, real, hole_area(real), real, hole_area(real), draws=10)
    assert found["ventricle_mm2"]["real_adjusted"].value == pytest.approx(expected)


def test_where_a_condition_is_the_class_nothing_is_adjusted():
    """All patients are women: least squares would divide the effect between the two in any way."""
    real = cohort(30)
    same = {**real.conditions, "sex": np.where(real.labels == 0, "F", "M")}
    collinear = replace(real, conditions=same)
    for one, other, which in ((collinear, real, "real"), (real, collinear, "synthetic")):
        found = adjusted_effects(describe_real(real), one, hole_area(real), other, hole_area(real), draws=10)
        note = found["ventricle_mm2"]["adjusted_ratio"].note
        assert note == f"class and conditions cannot be told apart in the {which} slices"


def test_without_known_conditions_nothing_is_adjusted():
    real = cohort(20)
    marginal = replace(real, conditions={})
    found = adjusted_effects(describe_real(real), real, hole_area(real), marginal, hole_area(real), draws=10)
    assert found["ventricle_mm2"]["adjusted_ratio"].value is None
    assert "too few synthetic" in found["ventricle_mm2"]["adjusted_ratio"].note


def test_a_subjects_conditions_are_those_that_all_its_slices_have():
    """The mean of the ages at two visits; none of a category, or a number, that differs among the slices."""
    images = cohort(1, slices=4)
    ages = np.array(["70", "72", "70", "72", "70", "80", "70", "80"])
    images = replace(images, conditions={"age": ages, "sex": np.array(["F"] * 6 + ["M"] * 2)})
    found = subject_conditions(images, ["0-0", "0-1"], [0, 1], ABOUT)
    assert found[0].tolist() == [71, 0] and np.isnan(found[1]).all()


def test_one_with_two_diagnoses_counts_in_both():
    """A converter has a row for each; resampling takes both."""
    train, held_out = cohort(12), cohort(12, seed=1)
    converter = replace(held_out, subjects=np.where(held_out.subjects == "1-1", "1-0", held_out.subjects))
    classifier = train_classifier(train, steps=4)
    options = {"about": describe_real(train), "steps": 4, "draws": 50}
    found = train_on_synthetic_test_on_real(classifier, train, train, converter, **options)["matched"]
    assert found["real"].low <= found["real"].value <= found["real"].high
    assert "matched by age, sex" in found["real"].note
    apart = replace(held_out, conditions={"sex": np.where(held_out.labels == 0, "F", "M")})
    found = train_on_synthetic_test_on_real(classifier, train, train, apart, **options)["matched"]
    assert found["real"].value is None and "no two subjects" in found["real"].note


def test_the_matched_auc_counts_pairs_of_the_same_covariates_alone():
    """Scores that only know the age separate the groups, and say nothing among people of one age."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 60)
    age = rng.normal(70 + 10 * labels, 5)
    pairs = np.abs(age[labels == 1][:, None] - age[labels == 0][None, :]) < 1
    times = np.ones((2, 120))
    everyone = matched_auc(labels, age, np.ones_like(pairs), times)[0]
    matched = matched_auc(labels, age, pairs, times)[0]
    assert everyone > 0.85 and matched == pytest.approx(0.5, abs=0.1)
    by_hand = np.mean([
        float(one > other)
        for one, row in zip(age[labels == 1], pairs)
        for other, compared in zip(age[labels == 0], row)
        if compared
    ])  # fmt: skip
    assert matched == pytest.approx(by_hand)
    assert np.isnan(matched_auc(labels, age, np.zeros_like(pairs), times)).all()


def test_only_allowed_training_images_are_searched():
    train, images = cohort(8, slices=1), cohort(8, slices=1).take(slice(4))
    allowed = np.ones((4, len(train)), bool)
    allowed[np.arange(4), np.arange(4)] = False  # not the image itself
    allowed[3] = False
    everywhere = nearest_in_pixels(images.images, train.images, train.subjects)
    found = nearest_in_pixels(images.images, train.images, train.subjects, allowed)
    assert everywhere.rows.tolist() == [0, 1, 2, 3]
    assert (found.rows[:3] != np.arange(3)).all() and np.isfinite(found.distances[:3]).all()
    assert np.isinf(found.distances[3]) and found.ratios[3] == 1


def test_copies_are_searched_among_the_same_conditions_as_well():
    train, held_out = cohort(30), cohort(15, seed=1)
    samples = join(train.take(slice(30)), cohort(15, seed=2))  # 30 exact copies of 90
    samples = replace(samples, subjects=np.array([f"sample {k}" for k in range(len(samples))]))
    found = measure_memorization(samples, train, held_out, about=describe_real(train)).metrics
    assert found["matched_copies"].value >= 0.3 and found["matched_near_copies"].value > 0
    assert found["matched_copies_excess"].low > 0
    assert "matched_copies" not in measure_memorization(samples, train, held_out).metrics
