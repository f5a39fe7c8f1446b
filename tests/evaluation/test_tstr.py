"""TSTR by subject: metrics equal those of scikit-learn, and are low for mislabelled samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from discs import discs
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from adni_ldm.evaluation.classifier import probabilities, train_classifier
from adni_ldm.evaluation.tstr import (
    auc,
    balanced_accuracy,
    subject_probabilities,
    train_on_synthetic_test_on_real,
)


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_and_balanced_accuracy_are_those_of_sklearn(classes):
    rng = np.random.default_rng(0)
    labels = rng.choice(
        classes, 60, p=[0.6, 0.3, 0.1][3 - classes :] / np.sum([0.6, 0.3, 0.1][3 - classes :])
    )
    scores = rng.dirichlet(np.ones(classes), 60).round(1) + np.eye(classes)[labels] * 0.2  # with ties
    scores /= scores.sum(1, keepdims=True)
    expected = (
        roc_auc_score(labels, scores[:, 1])
        if classes == 2
        else roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    )
    assert np.isclose(auc(labels, scores), expected)
    assert 0.5 < expected < 1
    assert np.isclose(balanced_accuracy(labels, scores), balanced_accuracy_score(labels, scores.argmax(1)))


def test_metrics_without_a_class_are_nan():
    assert np.isnan(auc(np.zeros(3, int), np.full((3, 2), 0.5)))
    assert np.isnan(balanced_accuracy(np.zeros(3, int), np.full((3, 2), 0.5)))


def test_a_subjects_probability_is_the_mean_of_its_slices():
    images = discs(6, 3, seed=3)
    images = images.take(np.random.default_rng(0).permutation(36))
    model = train_classifier(images, steps=2, batch_size=8)
    means, labels, subjects = subject_probabilities(model, images)
    assert means.shape == (12, 2)
    for mean, label, subject in zip(means, labels, subjects):
        rows = images.subjects == subject
        assert np.allclose(mean, probabilities(model, images)[rows].mean(0), atol=1e-6)
        assert (images.labels[rows] == label).all()


def test_good_samples_reach_the_auc_of_real_slices_and_mislabelled_ones_do_not():
    train, held_out, good = discs(30, 2, size=16), discs(12, 2, seed=1, size=16), discs(60, seed=2, size=16)
    options = {"steps": 25, "draws": 200}
    classifier = train_classifier(train, steps=25)
    right = train_on_synthetic_test_on_real(classifier, train, good, held_out, **options)
    wrong = train_on_synthetic_test_on_real(
        classifier, train, replace(good, labels=1 - good.labels), held_out, **options
    )
    assert set(right) == {"real", "synthetic", "both", "relative_auc"}
    assert right["real"]["auc"].value > 0.95 and right["synthetic"]["auc"].value > 0.95
    assert right["both"]["balanced_accuracy"].value > 0.9
    assert right["relative_auc"].value > 0.9
    assert right["synthetic"]["auc"].reference == right["real"]["auc"].value
    assert wrong["synthetic"]["auc"].value < 0.1 and wrong["relative_auc"].high < 0
    assert wrong["real"] == right["real"]


def test_an_interval_of_width_zero_has_a_note():
    held_out = discs(10, seed=1)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(32 * 32, 2))
    torch.nn.init.zeros_(classifier[1].weight), torch.nn.init.zeros_(classifier[1].bias)
    figures = train_on_synthetic_test_on_real(
        classifier, discs(20), discs(20, seed=2), held_out, steps=1, draws=50
    )
    assert figures["real"]["auc"].value == figures["real"]["auc"].low == 0.5
    assert "20 subjects are too few" in figures["real"]["auc"].note


def test_too_few_subjects_or_samples_give_no_value_but_the_reason():
    train, classifier = discs(20), None
    missing = train_on_synthetic_test_on_real(classifier, train, discs(20).of_class("AD"), discs(10, seed=1))
    assert (
        missing["synthetic"]["auc"].value is None
        and missing["relative_auc"].note == "0 samples of NC: at least 20 are needed"
    )
    few = train_on_synthetic_test_on_real(classifier, train, discs(20), discs(4, 3, seed=1))
    assert few["real"]["auc"].note == "4 held-out subjects of AD: at least 10 are needed"
