"""Anatomical measures of samples beside real slices: location, spread, and the effect of the disease.

A generative model can keep the difference between the classes and lose the variety within them, which alone
exaggerates Cohen's d: d is the difference of the means over the standard deviation, so the ratio of d is the
ratio of the differences over the ratio of the standard deviations. All three are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from adni_ldm.evaluation.anatomy import MEASURES
from adni_ldm.evaluation.estimates import (
    FEWEST_SLICES,
    FEWEST_SUBJECTS,
    Estimate,
    Resamples,
    estimate,
    unknown,
)
from adni_ldm.evaluation.image_sets import ImageSet

# The measures whose location and spread count for fidelity. The ratio of the areas says nothing that the
# areas do not, and most slices have no bright area outside the brain.
COMPARED = ("ventricle_mm2", "brain_mm2", "border_mm", "intensity")

NEGLIGIBLE = 0.2  # Cohen's d; a ratio to so small an effect says nothing


def compare_anatomy(
    real: ImageSet,
    real_values: Mapping[str, np.ndarray],
    samples: ImageSet,
    sample_values: Mapping[str, np.ndarray],
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, dict | Estimate]:
    """Location, spread and effect of the first class against the last, for each of MEASURES.

    Args:
        real, samples: the slices that were measured.
        real_values, sample_values: results of `measure_anatomy` on them, {measure: (N,)}.

    Returns:
        {measure: `compare_measure`'s}, and "spread": the geometric mean of the ratios of standard deviations,
        samples ÷ real, over the classes and the measures COMPARED.
    """
    draws_of = {
        name: _draw_moments(real, real_values[name], samples, sample_values[name], seed, draws)
        for name in MEASURES
    }
    results = {name: _compare(found, real.class_names) for name, found in draws_of.items()}
    gap = next((one.note for one in results[COMPARED[0]]["spread"].values() if one.value is None), "")
    if gap:
        return results | {"spread": unknown(gap)}
    groups = [draws_of[name][0] for name in COMPARED]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [
            np.log(one["synthetic", name][1] / one["real", name][1])
            for name in real.class_names
            for one in groups
        ]
    return results | {"spread": estimate(np.exp(np.mean(logs, axis=0)))}


def compare_measure(
    real: ImageSet,
    real_values: np.ndarray,
    samples: ImageSet,
    sample_values: np.ndarray,
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, dict[str, Estimate] | Estimate]:
    """One measure (N,) and (M,) of real slices and samples; intervals are over subjects.

    Returns:
        "real" and "synthetic", the mean of each class; "location", the standardized difference of the means
        of each class, (samples - real) / SD of real; "spread", the ratio of the standard deviations of each
        class; "effect_real" and "effect_synthetic", Cohen's d (1988) of the first class against the last,
        over slices; and samples ÷ real of d, "effect_ratio", and of the difference of the means,
        "difference_ratio", which have no value if the effect in real slices may be negligible.
    """
    return _compare(_draw_moments(real, real_values, samples, sample_values, seed, draws), real.class_names)


def _draw_moments(
    real: ImageSet,
    real_values: np.ndarray,
    samples: ImageSet,
    sample_values: np.ndarray,
    seed: int,
    draws: int,
) -> tuple[dict[tuple[str, str], tuple[np.ndarray, np.ndarray]], dict[tuple[str, str], str]]:
    """Bootstrap draws (B + 1,) of mean and standard deviation, and what there is too little of, each
    by ("real" or "synthetic", class)."""
    groups, gaps = {}, {}
    for label, name in enumerate(real.class_names):
        for which, one, values in (("real", real, real_values), ("synthetic", samples, sample_values)):
            rows = (one.labels == label) & np.isfinite(values)  # without what could not be measured
            gaps[which, name] = _gap(one.subjects[rows], which, name)
            resamples = Resamples.draw(one.subjects[rows], draws, [seed, which == "synthetic", label])
            groups[which, name] = resamples.mean(values[rows]), resamples.deviation(values[rows])
    return groups, gaps


def _compare(drawn: tuple[dict, dict], names: Sequence[str]) -> dict[str, dict[str, Estimate] | Estimate]:
    """What `compare_measure` returns, of what `_draw_moments` did."""
    groups, gaps = drawn

    def estimated(draws_of, *keys: tuple[str, str]) -> Estimate:
        gap = next((gaps[key] for key in keys if gaps[key]), "")
        if gap:
            return unknown(gap)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = draws_of(*(groups[key] for key in keys))
        if not np.isfinite(found[0]):
            return unknown("all slices of a class have the same value")
        return estimate(found)

    pairs = {name: (("real", name), ("synthetic", name)) for name in names}
    result = {
        which: {name: estimated(lambda one: one[0], (which, name)) for name in names}
        for which in ("real", "synthetic")
    }
    result["location"] = {
        name: estimated(lambda one, other: (other[0] - one[0]) / one[1], *pairs[name]) for name in names
    }
    result["spread"] = {name: estimated(lambda one, other: other[1] / one[1], *pairs[name]) for name in names}
    ends = names[0], names[-1]  # of three classes, the two at the ends
    real_keys, sample_keys = ([(which, name) for name in ends] for which in ("real", "synthetic"))
    result["effect_real"] = estimated(cohens_d, *real_keys)
    result["effect_synthetic"] = estimated(cohens_d, *sample_keys).with_reference(result["effect_real"].value)
    d = result["effect_real"]
    if d.value is not None and not (d.low is not None and (d.low > NEGLIGIBLE or d.high < -NEGLIGIBLE)):
        note = "the effect in real slices is not distinguishable from a negligible one"
        return result | {"effect_ratio": unknown(note), "difference_ratio": unknown(note)}
    keys = (*real_keys, *sample_keys)
    result["effect_ratio"] = estimated(lambda a, b, c, e: cohens_d(c, e) / cohens_d(a, b), *keys)
    result["difference_ratio"] = estimated(lambda a, b, c, e: (c[0] - e[0]) / (a[0] - b[0]), *keys)
    return result


def cohens_d(one: tuple, other: tuple):
    """Difference of the means over the pooled standard deviation (Cohen 1988), of the (mean, SD) of two
    groups, numbers or arrays."""
    return (one[0] - other[0]) / np.sqrt((one[1] ** 2 + other[1] ** 2) / 2)


def _gap(subjects: np.ndarray, which: str, name: str) -> str:
    """Why a class cannot be measured; empty where it can."""
    if which == "synthetic":
        few = len(subjects) < FEWEST_SLICES
        return f"{len(subjects)} samples of {name}: at least {FEWEST_SLICES} are needed" if few else ""
    count = len(np.unique(subjects))
    few = count < FEWEST_SUBJECTS
    return f"{count} real subjects of {name}: at least {FEWEST_SUBJECTS} are needed" if few else ""
