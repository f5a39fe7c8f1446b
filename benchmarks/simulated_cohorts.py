"""Features, measures, scores and distances of simulated cohorts and samples, and the verdicts on them.

Nothing is rendered and no network is trained, so hundreds of cohorts take minutes. Everything after the
measurement is the code of evaluate.py. A slice's values are normal, of which the share ICC of the variance is
the subject's; the classes differ by d standard deviations in the ventricle and in the first feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from adni_ldm.evaluation.anatomy import MEASURES
from adni_ldm.evaluation.conditioning import accuracy_metrics
from adni_ldm.evaluation.effects import compare_anatomy
from adni_ldm.evaluation.estimates import unknown
from adni_ldm.evaluation.fidelity import compare_features
from adni_ldm.evaluation.image_sets import ImageSet, too_few
from adni_ldm.evaluation.nearest_neighbors import Neighbors
from adni_ldm.evaluation.privacy import copy_metrics, membership_auc
from adni_ldm.evaluation.spectrum import BANDS, compare_spectra
from adni_ldm.evaluation.tstr import tstr_metrics
from adni_ldm.evaluation.verdicts import verdicts

CLASSES = ("AD", "NC")
FEATURES = 16
SLICES = 10  # of each subject
ICC = 0.8
SCALES = {"ventricle_ratio": 0.3, "ventricle_mm2": 0.3, "brain_mm2": 0.08, "border_mm": 0.1, "intensity": 0.1}


@dataclass(frozen=True)
class Slices:
    """What is measured of N slices."""

    images: ImageSet  # classes and subjects; no pixels
    features: np.ndarray  # (N, FEATURES)
    measures: dict[str, np.ndarray]  # (N,) of each of MEASURES, relative to the mean of healthy subjects
    power: dict[str, np.ndarray]  # (N,) of each of BANDS, relative
    ratios: np.ndarray  # (N,), of the distance to the nearest training slice


def sample_slices(rng: np.random.Generator, subjects: int, slices: int, d: float, name: str) -> Slices:
    """`slices` of each of `subjects` of each class."""
    labels = np.repeat([0, 1], subjects * slices)
    owners = np.repeat(np.arange(2 * subjects), slices)

    def normal(width: int, icc: float = ICC) -> np.ndarray:
        own = rng.normal(size=(2 * subjects, width))[owners]
        return np.sqrt(icc) * own + np.sqrt(1 - icc) * rng.normal(size=(len(labels), width))

    shared = normal(FEATURES + len(SCALES) + len(BANDS))
    shared[:, 0] += d * (labels == 0)
    values = {key: shared[:, FEATURES + k] for k, key in enumerate(SCALES)}
    values["ventricle_mm2"] = values["ventricle_ratio"] = shared[:, 0]
    measures = {key: 1 + SCALES[key] * values[key] for key in SCALES}
    measures["blobs_mm2"] = np.zeros(len(labels))
    bands = np.exp(0.2 * shared[:, -len(BANDS) :])
    empty = torch.zeros((len(labels), 1, 1, 1), dtype=torch.uint8)
    names = np.array([f"{name}{owner}" for owner in owners])
    return Slices(
        ImageSet(empty, labels, names, CLASSES),
        shared[:, :FEATURES],
        {key: measures[key] for key in MEASURES},
        dict(zip(BANDS, bands.T)),
        1 + 0.12 * normal(1, 0.3)[:, 0],
    )


def pick(slices: Slices, rows: np.ndarray) -> Slices:
    """The rows, each a subject of its own as samples are."""
    images = slices.images.take(rows)
    names = np.array([f"sample {k}" for k in range(len(rows))])
    return Slices(
        replace(images, subjects=names),
        slices.features[rows],
        {key: one[rows] for key, one in slices.measures.items()},
        {key: one[rows] for key, one in slices.power.items()},
        slices.ratios[rows],
    )


def outliers(samples: Slices, share: float, rng: np.random.Generator, common: bool) -> Slices:
    """A share replaced by slices that are no brains: far in feature space, and wrong in what is measured."""
    rows = rng.random(len(samples.features)) < share
    away = rng.normal(size=(1 if common else len(rows), FEATURES))
    away *= 6 / np.linalg.norm(away, axis=1, keepdims=True)
    return replace(
        samples,
        features=np.where(rows[:, None], samples.features + away, samples.features),
        measures={key: np.where(rows, 2 * one, one) for key, one in samples.measures.items()},
        power={key: np.where(rows, (2 if common else 20) * one, one) for key, one in samples.power.items()},
    )


def shrink(samples: Slices, factor: float) -> Slices:
    """The spread within each class times a factor."""

    def toward(values: np.ndarray) -> np.ndarray:
        result = values.copy()
        for label in np.unique(samples.images.labels):
            rows = samples.images.labels == label
            mean = values[rows].mean(0)
            result[rows] = mean + factor * (values[rows] - mean)
        return result

    measures = {key: toward(one) for key, one in samples.measures.items()}
    return replace(samples, features=toward(samples.features), measures=measures)


def shift(samples: Slices, by: float) -> Slices:
    """The disease effect changed by `by` standard deviations, in the ventricle and in the features."""
    change = by * (samples.images.labels == 0)
    features = samples.features.copy()
    features[:, 0] += change
    keys = ("ventricle_ratio", "ventricle_mm2")
    moved = {key: samples.measures[key] + SCALES[key] * change for key in keys}
    return replace(samples, features=features, measures={**samples.measures, **moved})


def relabel(samples: Slices, labels: np.ndarray) -> Slices:
    return replace(samples, images=replace(samples.images, labels=labels))


def copies(samples: Slices, share: float, ratio: float, rng: np.random.Generator) -> Slices:
    """A share of samples whose distance ratio is that of copies, give or take 0.1."""
    rows = rng.random(len(samples.ratios)) < share
    copied = rng.normal(ratio, 0.1, len(rows))
    return replace(samples, ratios=np.where(rows, np.minimum(copied, samples.ratios), samples.ratios))


def plant(name: str, samples: Slices, d: float, rng: np.random.Generator) -> Slices:
    """Samples of the true population, with the fault of that name."""
    count = len(samples.features)
    labels = samples.images.labels
    if name in ("perfect", "membership"):
        return samples
    if name == "noise 18 %":
        return outliers(samples, 0.18, rng, common=False)
    if name == "inverted 18 %":
        return outliers(samples, 0.18, rng, common=True)
    if name == "blur":
        factors = dict(zip(BANDS, (0.6, 0.25, 0.1)))
        power = {key: factors[key] * one for key, one in samples.power.items()}
        border = {**samples.measures, "border_mm": 0.9 * samples.measures["border_mm"]}
        return replace(samples, features=samples.features + 0.3, power=power, measures=border)
    if name == "brightness + 15 %":
        bright = {**samples.measures, "intensity": 1.15 * samples.measures["intensity"]}
        return replace(samples, features=samples.features + 0.1, measures=bright)
    if name == "one repeated":
        return relabel(pick(samples, np.zeros(count, int)), labels)
    if name == "20 repeated + outliers":
        few = np.concatenate([rng.choice(np.flatnonzero(labels == k), 10) for k in (0, 1)])
        rows = np.where(
            labels == 0, few[rng.integers(10, size=count)], few[10 + rng.integers(10, size=count)]
        )
        return outliers(pick(samples, rows), 0.08, rng, common=False)
    if name == "SD × 0.65":
        return shrink(samples, 0.65)
    if name == "classes swapped":
        return relabel(samples, 1 - labels)
    if name == "class ignored":
        return relabel(samples, rng.permutation(labels))
    if name == "effect × 2":
        return shift(samples, d)
    if name == "effect × 0.4":
        return shift(samples, -0.6 * d)
    if name == "copies 10 %":
        return copies(samples, 0.1, 0.2, rng)
    if name == "copies 3 %":
        return copies(samples, 0.03, 0.2, rng)
    if name == "turned copies 10 %":
        return copies(samples, 0.1, TURNED, rng)
    if name == "training slices":
        return copies(samples, 1.0, 0.2, rng)
    raise ValueError(name)


TURNED = 0.16  # median distance ratio of copies rotated by 6 degrees (phantom, 64 pixels)

FAULTS = {  # the verdict that each should turn to no
    "fidelity": (
        "noise 18 %",
        "inverted 18 %",
        "blur",
        "brightness + 15 %",
        "one repeated",
        "20 repeated + outliers",
        "SD × 0.65",
    ),
    "usefulness": ("classes swapped", "class ignored"),
    "faithfulness": ("classes swapped", "class ignored", "effect × 2", "effect × 0.4"),
    "privacy": ("training slices", "copies 10 %", "copies 3 %", "turned copies 10 %", "membership"),
}


def simulated_verdicts(
    fault: str,
    seed: int,
    *,
    subjects: int = 100,
    samples: int = 500,
    d: float = 2.0,
    questions: tuple[str, ...] = tuple(FAULTS),
    draws: int = 400,
) -> Mapping[str, bool | None]:
    """The verdict on each of `questions`, on one simulated cohort.

    Args:
        subjects: of each class, in train and held out alike.
        samples: of each class.
    """
    rng = np.random.default_rng([seed, *fault.encode()])
    train = sample_slices(rng, subjects, SLICES, d, "train")
    held_out = sample_slices(rng, subjects, SLICES, d, "test")
    drawn = plant(fault, sample_slices(rng, samples, 1, d, "sample "), d, rng)
    return {
        name: one["good"]
        for name, one in verdicts(measure(train, held_out, drawn, fault, rng, questions, draws)).items()
        if name in questions
    }


def measure(
    train: Slices,
    held_out: Slices,
    samples: Slices,
    fault: str,
    rng: np.random.Generator,
    questions: tuple[str, ...],
    draws: int,
) -> dict[str, Mapping]:
    """The sections of metrics.json; those that no question needs are left unknown."""
    missing = unknown("not simulated")

    class Missing(dict):
        def __missing__(self, key):
            return missing

    metrics = {"fidelity": {"all": Missing()}, "spectrum": {"samples": {}}}
    real = [np.concatenate(pair) for pair in zip(_columns(train), _columns(held_out))]
    labels, subjects, *values = real
    every = ImageSet(torch.zeros(len(labels), 1, 1, 1), labels, subjects, CLASSES)
    if {"fidelity", "faithfulness"} & set(questions):
        anatomy = compare_anatomy(
            every, dict(zip(MEASURES, values)), samples.images, samples.measures, draws=draws
        )
    else:
        pair = {name: missing for name in CLASSES}
        anatomy = {name: Missing(location=pair, spread=pair) for name in MEASURES} | {"spread": missing}
    metrics["anatomy"] = anatomy
    if "fidelity" in questions:
        chosen = rng.permutation(len(train.features))[: len(samples.features)]
        features = (held_out.features, train.features[chosen], samples.features)
        owners = (held_out.images.subjects, train.images.subjects[chosen], samples.images.subjects)
        if not too_few(samples.images, held_out.images):
            metrics["fidelity"]["all"] = compare_features(features, owners, draws=draws, fid=False)
        metrics["spectrum"]["samples"] = compare_spectra(
            held_out.images, held_out.power, samples.images, samples.power, draws=draws
        )
    metrics["tstr"] = {"real": Missing(), "synthetic": Missing(), "relative_auc": missing}
    metrics["conditioning"] = {"class_conditioning_accuracy": Missing()}
    if {"usefulness", "faithfulness"} & set(questions):
        of_real, of_samples = (
            LogisticRegression().fit(one.features, one.images.labels) for one in (train, samples)
        )
        hits = [of_real.predict(one.features) == one.images.labels for one in (samples, held_out)]
        metrics["conditioning"]["class_conditioning_accuracy"] = accuracy_metrics(
            hits[0], samples.images, hits[1], held_out.images, draws
        )
        names, first, codes = np.unique(held_out.images.subjects, return_index=True, return_inverse=True)
        counts = np.bincount(codes)
        scores = {
            key: np.stack(
                [np.bincount(codes, p) / counts for p in model.predict_proba(held_out.features).T], 1
            )
            for key, model in (("real", of_real), ("synthetic", of_samples), ("both", of_real))
        }
        metrics["tstr"] = tstr_metrics(held_out.images.labels[first], names, scores, draws=draws)
    metrics["privacy"] = {"copies": missing, "copies_excess": missing}
    if "privacy" in questions:
        metrics["privacy"], _ = copy_metrics(
            _neighbors(samples), samples.images, _neighbors(held_out), held_out.images, train.images
        )
        gap = 0.8 if fault == "membership" else 0.0  # of the losses, in SD between subjects
        counts = [len(np.unique(one.images.subjects)) for one in (train, held_out)]
        losses = [rng.normal(-gap, 1, counts[0]), rng.normal(0, 1, counts[1])]
        metrics["privacy"]["membership_auc"] = membership_auc(
            losses[0], np.arange(counts[0]), losses[1], np.arange(counts[1])
        )
        metrics["privacy"]["unseen_cohorts"] = []
    return metrics


def _columns(slices: Slices) -> list[np.ndarray]:
    return [slices.images.labels, slices.images.subjects, *(slices.measures[key] for key in MEASURES)]


def _neighbors(slices: Slices) -> Neighbors:
    count = len(slices.ratios)
    rows = np.zeros(count, np.int64)
    return Neighbors(rows, slices.ratios, slices.ratios, np.zeros((count, 2), np.int64))
