"""Effect of the disease on anatomy, in real slices and in samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adni_ldm.evaluation.anatomy import MEASURES, cohens_d
from adni_ldm.evaluation.estimates import FEWEST_SLICES, FEWEST_SUBJECTS, Estimate, bootstrap, unknown
from adni_ldm.evaluation.image_sets import ImageSet


def compare_anatomy(
    real: ImageSet,
    real_values: Mapping[str, np.ndarray],
    samples: ImageSet,
    sample_values: Mapping[str, np.ndarray],
    seed: int = 0,
) -> dict[str, dict]:
    """Class means and the effect of the first class against the last, for each of MEASURES.

    Args:
        real, samples: the slices that were measured.
        real_values, sample_values: results of `measure_anatomy` on them, {measure: (N,)}.

    Returns:
        {measure: {"real": {class: Estimate}, "synthetic": {class: Estimate}, "effect_real": Estimate,
        "effect_synthetic": Estimate, "effect_ratio": Estimate}}. Effects are Cohen's d over slices; intervals
        are over subjects. The ratio is synthetic ÷ real; it has no value if the real effect may be zero.
    """
    return {
        measure: _compare(real, real_values[measure], samples, sample_values[measure], seed)
        for measure in MEASURES
    }


def _compare(
    real: ImageSet, real_values: np.ndarray, samples: ImageSet, sample_values: np.ndarray, seed: int
) -> dict:
    one, other = 0, len(real.class_names) - 1  # of three classes, the two at the ends
    groups = [_of(real, real_values, label) for label in (one, other)]
    groups += [_of(samples, sample_values, label) for label in (one, other)]
    result = {
        "real": {name: _mean(*_of(real, real_values, k), seed) for k, name in enumerate(real.class_names)},
        "synthetic": {
            name: _mean(*_of(samples, sample_values, k), seed) for k, name in enumerate(real.class_names)
        },
    }
    values, subjects = zip(*groups)
    if gap := _gap(subjects):
        names = ("effect_real", "effect_synthetic", "effect_ratio")
        return result | {name: unknown(gap) for name in names}

    def effect(first, second, *rows):
        return cohens_d(values[first][rows[0]], values[second][rows[1]])

    def ratio(*rows):
        return effect(2, 3, *rows[2:]) / effect(0, 1, *rows[:2])

    every = [np.arange(len(value)) for value in values]
    d_real, d_synthetic = effect(0, 1, *every[:2]), effect(2, 3, *every[2:])
    real_interval = bootstrap(lambda *rows: effect(0, 1, *rows), *subjects[:2], seed=seed)
    interval = bootstrap(lambda *rows: effect(2, 3, *rows), *subjects[2:], seed=seed)
    result["effect_real"] = _effect(d_real, real_interval)
    result["effect_synthetic"] = _effect(d_synthetic, interval).with_reference(d_real)
    if result["effect_synthetic"].value is None:
        result["effect_ratio"] = unknown("all samples of a class have the same value")
    elif not (real_interval[0] > 0 or real_interval[1] < 0):  # NaN as well
        result["effect_ratio"] = unknown("the effect in real slices is not distinguishable from zero")
    else:
        result["effect_ratio"] = Estimate(d_synthetic / d_real, *bootstrap(ratio, *subjects, seed=seed))
    return result


def _effect(d: float, interval: tuple[float, float]) -> Estimate:
    return Estimate(d, *interval) if np.isfinite(d) else unknown("all slices of a class have the same value")


def _of(images: ImageSet, values: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and subjects of one class, without the slices that could not be measured."""
    chosen = (images.labels == label) & np.isfinite(values)
    return values[chosen], images.subjects[chosen]


def _mean(values: np.ndarray, subjects: np.ndarray, seed: int) -> Estimate:
    if len(np.unique(subjects)) < 2:
        return unknown("fewer than two subjects could be measured")
    return Estimate(values.mean(), *bootstrap(lambda rows: values[rows].mean(), subjects, seed=seed))


def _gap(subjects: tuple[np.ndarray, ...]) -> str:
    """Why the effect cannot be estimated; empty where it can."""
    counts = [len(np.unique(group)) for group in subjects]
    if min(counts[:2]) < FEWEST_SUBJECTS:
        return f"{min(counts[:2])} real subjects of a class: at least {FEWEST_SUBJECTS} are needed"
    if min(counts[2:]) < FEWEST_SLICES:
        return f"{min(counts[2:])} samples of a class: at least {FEWEST_SLICES} are needed"
    return ""
