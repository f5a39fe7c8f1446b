"""The verdicts on planted faults, in features and measures made directly: 100 held-out subjects of each
class.

benchmarks/operating_curves.py counts the answers over 200 cohorts and other numbers of subjects;
benchmarks/verdict_battery.py plants the faults in slices and runs evaluate.py.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from simulated_cohorts import FAULTS, simulated_verdicts  # noqa: E402

from adni_ldm.evaluation.conditioning import accuracy_metrics  # noqa: E402
from adni_ldm.evaluation.effects import COMPARED, compare_measure  # noqa: E402
from adni_ldm.evaluation.estimates import Estimate, difference_of_proportions, proportion  # noqa: E402
from adni_ldm.evaluation.fidelity import RATIOS  # noqa: E402
from adni_ldm.evaluation.image_sets import ImageSet  # noqa: E402
from adni_ldm.evaluation.spectrum import BANDS  # noqa: E402
from adni_ldm.evaluation.verdicts import _conditioning, _fidelity, _privacy, _tstr  # noqa: E402

QUESTIONS = tuple(FAULTS)


@pytest.mark.parametrize("question", QUESTIONS)
def test_samples_of_the_true_population_get_favourable_verdicts(question):
    assert simulated_verdicts("perfect", 0, questions=(question,), draws=200) == {question: True}


@pytest.mark.parametrize(
    ("question", "fault"), [(question, fault) for question, faults in FAULTS.items() for fault in faults]
)
def test_a_planted_fault_gets_an_unfavourable_verdict(question, fault):
    assert simulated_verdicts(fault, 0, questions=(question,), draws=200) == {question: False}


@pytest.mark.parametrize("few", [{"samples": 1}, {"subjects": 5}], ids=["2 samples", "5 subjects"])
def test_without_enough_data_every_verdict_is_inconclusive(few):
    assert simulated_verdicts("perfect", 0, draws=200, **few) == dict.fromkeys(QUESTIONS)


def with_interval(value, half):
    return Estimate(value, value - half, value + half, low_90=value - half, high_90=value + half)


@pytest.mark.parametrize("fault", ["kid_share", "coverage_ratio", "spread", "above 0.6", "location", None])
def test_a_fault_in_one_measure_alone_is_unfavourable(fault):
    """Everything else is as it should be."""
    good, bad = with_interval(1.0, 0.05), with_interval(0.5, 0.05)
    features = dict.fromkeys(RATIOS, good) | {"kid_share": with_interval(0.0, 0.01)}
    features["kid"] = with_interval(0.0, 0.01).with_reference(0.0)
    zero = with_interval(0, 0.1)
    anatomy = {
        name: {"location": {"AD": zero, "NC": zero}, "spread": {"AD": good, "NC": good}} for name in COMPARED
    }
    anatomy["spread"] = good
    power = dict.fromkeys(BANDS, good)
    if fault in features:
        features[fault] = bad
    elif fault == "location":
        anatomy[COMPARED[0]]["location"]["NC"] = with_interval(1.0, 0.05)
    elif fault == "spread":
        anatomy["spread"] = bad
    elif fault:
        power[fault] = bad
    assert _fidelity(features, anatomy, power)["good"] is (fault is None)


def privacy(copies, samples, membership, **others):
    found, reference = proportion(copies, samples), proportion(10, 1000)
    estimates = {
        "copies": found.with_reference(reference.value),
        "copies_excess": difference_of_proportions(found, reference),
        "near_copies": proportion(0, samples),
        "unseen_cohorts": [],
    }
    if membership is not None:
        estimates["membership_auc"] = membership
    return _privacy(estimates | others)["good"]


def test_privacy_is_decided_by_both_intervals():
    at_chance = with_interval(0.5, 0.05)
    assert privacy(10, 1000, at_chance) is True
    assert privacy(40, 1000, at_chance) is False, "4 % of copies, the reference is 1 %"
    assert privacy(1, 50, at_chance) is None, "one copy in 50 samples"
    assert privacy(0, 2, at_chance) is None, "two samples"
    assert privacy(10, 1000, None) is None, "membership was not tested"
    assert privacy(10, 1000, at_chance, near_copies=proportion(1, 1000)) is False, "one exact copy"
    assert privacy(10, 1000, with_interval(0.2, 0.1)) is False, "members have the higher loss"
    assert privacy(10, 1000, with_interval(0.6, 0.1)) is None
    assert privacy(10, 1000, with_interval(0.8, 0.15)) is False
    assert privacy(10, 1000, at_chance, unseen_cohorts=["a1b2 (unet)"]) is None
    assert privacy(10, 1000, at_chance, unseen_cohorts=None) is None
    assert privacy(40, 1000, at_chance, unseen_cohorts=None) is False, "copies of what is known"
    few, many = with_interval(0.0, 0.01), with_interval(0.05, 0.02)
    assert privacy(10, 1000, at_chance, matched_copies_excess=few) is True
    assert privacy(10, 1000, at_chance, matched_copies_excess=many) is False, "among the same conditions"
    wide = with_interval(0.0, 0.05)
    assert privacy(10, 1000, at_chance, matched_copies_excess=wide) is None
    assert privacy(10, 1000, at_chance, matched_near_copies=proportion(1, 1000)) is False


def test_a_classifier_at_chance_on_real_slices_decides_nothing():
    """AUC 0.57 on samples beside 0.60 on real slices is no evidence that samples can replace them."""
    auc = {"auc": with_interval(0.57, 0.1)}, {"auc": with_interval(0.6, 0.08)}
    relative = with_interval(0.7, 0.9)
    assert _tstr({"synthetic": auc[0], "real": auc[1], "relative_auc": relative})["good"] is None
    weak = {"synthetic": auc[0], "real": {"auc": with_interval(0.55, 0.1)}}
    verdict = _tstr({**weak, "relative_auc": with_interval(1, 0.1)})
    assert verdict["good"] is None and "not reliably above chance" in verdict["text"]


def measured(values, classes=("AD", "NC")):
    """One measure of one slice of each subject, half of them of each class."""
    labels = np.repeat([0, 1], len(values) // 2)
    return ImageSet(None, labels, np.arange(len(values)).astype(str), classes), values


@pytest.mark.parametrize("cause", ["the means make", "the spread makes"])
def test_an_exaggerated_effect_is_traced_to_the_means_or_to_the_spread(cause):
    rng = np.random.default_rng(0)
    offset = np.repeat([2.0, 0.0], 300)
    real, samples = rng.normal(size=600) + offset, rng.normal(size=600)
    samples = 2 * offset + samples if cause == "the means make" else offset + 0.5 * samples
    ventricle = compare_measure(*measured(real), *measured(samples))
    accuracy = {"all": with_interval(0.9, 0.02).with_reference(0.9), "relative": with_interval(1, 0.05)}
    verdict = _conditioning(accuracy, ventricle)
    assert verdict["good"] is False and "exaggerated" in verdict["text"] and cause in verdict["text"]
    assert ventricle["effect_ratio"].value == pytest.approx(2, rel=0.2)


def test_without_an_effect_in_real_slices_the_accuracy_decides_only_where_that_is_shown():
    rng = np.random.default_rng(0)
    accuracy = {"all": with_interval(0.9, 0.02).with_reference(0.9), "relative": with_interval(1, 0.05)}
    answers = {}
    for count in (40, 4000):
        values = rng.normal(size=count), rng.normal(size=count)
        ventricle = compare_measure(*measured(values[0]), *measured(values[1]))
        answers[count] = _conditioning(accuracy, ventricle)["good"]
    assert answers == {40: None, 4000: True}
    exaggerated = values[1] + 3 * np.repeat([1, 0], 2000)
    ventricle = compare_measure(*measured(values[0]), *measured(exaggerated))
    assert _conditioning(accuracy, ventricle)["good"] is False, "an effect that real slices do not have"


def test_samples_without_any_effect_are_reported_and_do_not_crash():
    """A model that ignores its label generates the same image for every class from the same noise."""
    rng = np.random.default_rng(0)
    real, same = rng.normal(size=600) + np.repeat([2.0, 0.0], 300), np.tile(rng.normal(size=300).round(1), 2)
    accuracy = {"all": with_interval(0.5, 0.02).with_reference(0.9), "relative": with_interval(0, 0.05)}
    verdict = _conditioning(accuracy, compare_measure(*measured(real), *measured(same)))
    assert verdict["good"] is False and "no disease effect" in verdict["text"]


def test_accuracy_is_balanced_and_needs_a_classifier_above_chance():
    """900 of AD and 100 of NC, every one shown as AD, are no evidence of conditioning."""

    def accuracy(sample_hits, real_hits):
        samples = ImageSet(None, np.repeat([0, 1], [900, 100]), np.arange(1000).astype(str), ("AD", "NC"))
        held_out = ImageSet(None, np.repeat([0, 1], 100), np.arange(200).astype(str), ("AD", "NC"))
        return accuracy_metrics(sample_hits, samples, real_hits, held_out)["relative"]

    real_hits = np.random.default_rng(0).random(200) < 0.85
    assert accuracy(np.repeat([True, False], [900, 100]), real_hits).high < 0.2
    at_chance = accuracy(np.ones(1000, bool), np.tile([True, False], 100))
    assert at_chance.value is None and "above chance" in at_chance.note
