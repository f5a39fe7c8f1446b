"""Fidelity metrics equal those of other implementations, and are worse for worse samples."""

import math

import numpy as np
import pytest
import torch
from discs import discs
from monai.metrics.regression import compute_ms_ssim
from scipy.linalg import sqrtm
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from adni_ldm.evaluation.fidelity import (
    MANIFOLD,
    METRICS,
    fidelity,
    frechet_distance,
    kernel_distance,
    manifold_metrics,
    radii,
    structural_similarity,
)
from adni_ldm.evaluation.image_sets import ImageSet


def gaussian(count, width, seed, mean=0.0):
    return np.random.default_rng(seed).normal(mean, 1, (count, width))


def exactly(features, mean, deviations):
    """Features transformed to have exactly this mean and these uncorrelated standard deviations."""
    centred = features - features.mean(0)
    white = centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T))).T
    return white * deviations + mean


def test_fid_of_gaussians_is_that_by_hand():
    x = exactly(gaussian(50, 3, 0), [0, 0, 0], [1, 2, 3])
    y = exactly(gaussian(80, 3, 1), [1, -2, 0], [1, 1, 5])
    assert math.isclose(frechet_distance(x, y), (1 + 4) + (0 + 1 + 4), rel_tol=1e-9)
    assert frechet_distance(x, x) < 1e-9


@pytest.mark.parametrize(
    "counts", [(200, 300), (200, 6), (5, 7)], ids=["full", "one singular", "both singular"]
)
def test_fid_is_that_of_torchmetrics_and_of_a_matrix_root(counts):
    x, y = gaussian(counts[0], 10, 0) @ gaussian(10, 10, 2), gaussian(counts[1], 10, 1, mean=0.3)
    means, covariances = zip(*[(one.mean(0), np.cov(one.T)) for one in (x, y)])
    tensors = [torch.from_numpy(part) for pair in zip(means, covariances) for part in pair]
    assert math.isclose(frechet_distance(x, y), _compute_fid(*tensors).item(), rel_tol=1e-4)
    if counts[1] > 10:  # scipy's root is not for singular matrices
        overlap = np.trace(sqrtm(covariances[0] @ covariances[1])).real
        traces = np.trace(covariances[0] + covariances[1])
        by_root = ((means[0] - means[1]) ** 2).sum() + traces - 2 * overlap
        assert math.isclose(frechet_distance(x, y), by_root, rel_tol=1e-6)


def test_kid_of_single_slices_is_that_of_torchmetrics():
    x, y = gaussian(40, 6, 0), gaussian(40, 6, 1, mean=0.5)
    expected = poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert math.isclose(kernel_distance(x, y, np.arange(40), np.arange(40)).value, expected, rel_tol=1e-9)


def test_kid_leaves_out_pairs_of_one_subject():
    x, y = gaussian(6, 4, 0), gaussian(5, 4, 1)
    x_subjects, y_subjects = np.array(list("aabbbc")), np.arange(5)

    def mean(one, other, left_out):
        return np.mean(
            [
                (a @ b / 4 + 1) ** 3
                for i, a in enumerate(one)
                for j, b in enumerate(other)
                if not left_out(i, j)
            ]
        )

    expected = (
        mean(x, x, lambda i, j: x_subjects[i] == x_subjects[j])
        + mean(y, y, lambda i, j: i == j)
        - 2 * mean(x, y, lambda i, j: False)
    )
    assert math.isclose(kernel_distance(x, y, x_subjects, y_subjects).value, expected, rel_tol=1e-9)


def test_kid_has_no_bias_and_its_interval_holds_the_truth():
    """Subjects of alike slices on one side, single slices on the other, of one distribution: KID is zero."""
    estimates = []
    for seed in range(60):
        subjects = np.repeat(np.arange(12), 5)
        x = gaussian(12, 8, [seed, 0])[subjects] + 0.1 * gaussian(60, 8, [seed, 1])
        y = gaussian(60, 8, [seed, 2]) * np.sqrt(1.01)
        estimates.append(kernel_distance(x, y, subjects, np.arange(60), draws=200))
    values = np.array([estimate.value for estimate in estimates])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(60)
    held = np.mean([estimate.low < 0 < estimate.high for estimate in estimates])
    assert held >= 0.9
    middles = np.array([(estimate.low + estimate.high) / 2 - estimate.value for estimate in estimates])
    assert abs(middles.mean()) < 0.5 * values.std(), "repeated rows do not bias it"


def test_manifold_metrics_are_those_of_a_second_implementation():
    real, other = gaussian(60, 5, 0), 0.7 * gaussian(90, 5, 1, mean=0.4)

    def balls(points, k):
        return NearestNeighbors(n_neighbors=k + 1).fit(points).kneighbors(points)[0][:, -1]

    def inside(points, centres, radius):  # (points, centres)
        return np.stack([np.linalg.norm(points - c, axis=1) < r for c, r in zip(centres, radius)], axis=1)

    expected = {
        "precision": inside(other, real, balls(real, 3)).any(1).mean(),
        "recall": inside(real, other, balls(other, 3)).any(1).mean(),
        "density": inside(other, real, balls(real, 5)).sum() / (5 * 90),
        "coverage": inside(other, real, balls(real, 5)).any(0).mean(),
    }
    figures = manifold_metrics(real, other, np.arange(60), np.arange(90), draws=50)
    for name, value in expected.items():
        assert math.isclose(figures[name].value, value, rel_tol=1e-9), name
        assert figures[name].low <= value <= figures[name].high
        assert 0 < value and (name == "density" or value < 1), "and the case is informative"


def test_slices_of_one_subject_are_not_neighbors():
    features = np.array([[0.0], [0.1], [0.2], [5.0], [7.0]])
    assert np.allclose(radii(features, np.array(list("aaabc")), 1), [5, 4.9, 4.8, 2, 2])


def test_ms_ssim_is_that_of_monai_and_of_other_subjects():
    pair = discs(1, size=64, classes=("NC",), seed=0), discs(1, size=64, classes=("NC",), seed=1)
    images = torch.cat([pair[0].images, pair[1].images])
    two = ImageSet(images, np.array([0, 0]), np.array(["a", "b"]), ("NC",))
    weights = np.array([0.0448, 0.2856, 0.3001]) / 0.6305
    first, second = (images[[i]].float() / 255 for i in (0, 1))
    expected = compute_ms_ssim(first, second, 2, weights=weights.tolist()).item()
    assert abs(structural_similarity(two).value - expected) < 0.02, "the two treat the border differently"
    assert 0.2 < expected < 0.8

    one = ImageSet(images, np.array([0, 0]), np.array(["a", "a"]), ("NC",))
    assert structural_similarity(one).value is None and "the same subject" in structural_similarity(one).note


def flat(images):
    """Means of 4 x 4 pixels, in place of a network's features."""
    return torch.nn.functional.avg_pool2d(images.floats(), 4).flatten(1).numpy()


def report(samples, train=None, held_out=None):
    sets = held_out or discs(15, 4, seed=1), train or discs(30, 4, seed=0), samples
    return fidelity(*sets, [flat(one) for one in sets], draws=100)


def test_good_samples_reach_the_reference_and_bad_ones_do_not():
    good = report(discs(60, seed=2))
    poor = discs(60, seed=2, holes=(0.16, 0.16))
    poor = ImageSet((poor.images * 0.8).byte(), poor.labels, poor.subjects, poor.class_names)
    poor, same = report(poor), discs(60, seed=2).take(np.arange(120) % 2)
    same = report(ImageSet(same.images, same.labels, np.arange(120).astype(str), same.class_names))
    for name in ("all", "AD", "NC"):
        assert set(good[name]) == set(METRICS)
        assert good[name]["kid"].low < good[name]["kid"].reference < good[name]["kid"].high
        assert (
            good[name]["recall"].value > 0.5
            and abs(good[name]["precision"].value - good[name]["precision"].reference) < 0.25
        )
        assert abs(good[name]["ms_ssim"].value - good[name]["ms_ssim"].reference) < 0.05
        for metric in ("kid", "fid"):
            assert poor[name][metric].low > poor[name][metric].reference, (name, metric)
        for metric in ("precision", "density", "coverage"):
            assert poor[name][metric].high < poor[name][metric].reference, (name, metric)
        for metric in ("recall", "coverage"):
            assert same[name][metric].high < same[name][metric].reference, "one slice of each class, repeated"
        assert same[name]["ms_ssim"].low > same[name]["ms_ssim"].reference
    assert good == report(discs(60, seed=2)), "the same numbers for the same seed"


def test_copies_of_the_training_set_reach_the_reference():
    train = discs(30, 4, seed=0)
    figures = report(train, train)["all"]
    for metric in ("kid", "kid_share", "fid", *MANIFOLD, "ms_ssim"):
        tolerance = 0.03 if metric == "ms_ssim" else 1e-9  # other pairs
        assert abs(figures[metric].value - figures[metric].reference) < tolerance, metric


def test_all_gives_every_class_the_same_share():
    """Three AD to one NC in the held-out set must not count against balanced samples."""
    held_out = discs(60, seed=1)
    held_out = held_out.take((held_out.labels == 0) | (np.arange(120) < 42))
    assert (held_out.labels == 1).sum() == 21
    samples = discs(60, seed=2)
    kid = report(samples, held_out=held_out)["all"]["kid"]
    mixed = kernel_distance(flat(held_out), flat(samples), held_out.subjects, samples.subjects)
    assert kid.low < 0 < kid.high < mixed.value


@pytest.mark.parametrize("make", [np.zeros_like, np.full_like], ids=["black", "grey"])
def test_constant_slices_give_finite_values(make):
    samples = discs(30, seed=2)
    pixels = make(samples.images.numpy(), *((128,) if make is np.full_like else ()))
    constant = ImageSet(torch.from_numpy(pixels), samples.labels, samples.subjects, samples.class_names)
    figures = report(constant)
    assert figures["all"]["precision"].value == figures["all"]["recall"].value == 0
    assert figures["all"]["ms_ssim"].value == 1
    figures = figures["all"] | report(constant, constant, constant)["all"]
    for name in ("kid", "fid", *MANIFOLD, "ms_ssim"):
        estimate = figures[name]
        assert estimate.value is not None and estimate.low is not None and estimate.reference is not None


def test_too_few_slices_give_no_value_but_the_reason():
    few = report(discs(60, seed=2).take(np.r_[0:39, 40:120:2]))
    assert few["NC"]["kid"].value is None and few["NC"]["fid"].note.startswith("19 samples of NC, of 19 sub")
    assert few["all"]["kid"].note == few["NC"]["kid"].note
    assert few["AD"]["kid"].value is not None
    one_subject = report(discs(60, seed=2), held_out=discs(1, 40, seed=1))
    note = "40 held-out slices of AD, of 1 subjects: at least 20 of 10 subjects are needed"
    assert one_subject["AD"]["ms_ssim"].note == note
