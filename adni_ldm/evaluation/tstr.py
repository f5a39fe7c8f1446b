"""Train on synthetic, test on real (TSTR): can samples replace real slices in training a classifier?

Esteban et al. 2017 (arXiv:1706.02633). The unit of testing is the subject: class probabilities are averaged
over the subject's slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import nn

from adni_ldm.evaluation.classifier import STEPS, probabilities, train_classifier
from adni_ldm.evaluation.covariates import comparable, subject_conditions
from adni_ldm.evaluation.estimates import Estimate, Resamples, estimate, roc_auc, unknown
from adni_ldm.evaluation.image_sets import ImageSet, join, too_few


def train_on_synthetic_test_on_real(
    classifier: nn.Module,
    train: ImageSet,
    samples: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = STEPS,
    draws: int = 1000,
    about: Mapping[str, Mapping] | None = None,
) -> dict[str, Estimate | dict[str, Estimate]]:
    """AUC and balanced accuracy by subject, of classifiers trained on real slices, on samples and on both.

    All three have the same architecture, seed and number of steps. Intervals resample held-out subjects.

    Args:
        about: description of the conditions that samples were asked for; adds "matched".
        classifier: what `train_classifier` returned for `train`, with `seed` and `steps`.
        train: real slices of the subjects that the model was trained on.
        held_out: real slices of other subjects, of every class.

    Returns:
        As `tstr_metrics`; no values where `too_few` samples or held-out subjects of a class. The error of
        training a classifier on so many samples is not in the intervals.
    """
    problem = too_few(samples, held_out)
    if problem:
        missing = {"auc": unknown(problem), "balanced_accuracy": unknown(problem)}
        return {"real": missing, "synthetic": missing, "both": missing, "relative_auc": unknown(problem)}

    def fit(images: ImageSet, what: str) -> nn.Module:
        description = f"Training a classifier on {what}"
        return train_classifier(images, seed=seed, device=device, steps=steps, description=description)

    classifiers = {
        "real": classifier,
        "synthetic": fit(samples, "samples"),
        "both": fit(join(train, samples), "both"),
    }
    by_subject = {name: subject_probabilities(model, held_out) for name, model in classifiers.items()}
    _, labels, subjects = by_subject["real"]
    scores = {name: result[0] for name, result in by_subject.items()}  # (S, K)
    results = tstr_metrics(labels, subjects, scores, seed=seed, draws=draws)
    if about and len(held_out.class_names) == 2:
        rows = subject_conditions(held_out, subjects, labels, about)  # (S, K)
        resamples = Resamples.draw(subjects, draws, seed)
        drawn = resamples.times @ resamples.subjects  # (B + 1, S); both rows of one with two diagnoses
        results["matched"] = _matched_aucs(labels, scores, rows, about, drawn)
    return results


def _matched_aucs(
    labels: np.ndarray,
    scores: Mapping[str, np.ndarray],
    rows: np.ndarray,
    about: Mapping[str, Mapping],
    drawn: np.ndarray,
) -> dict[str, Estimate]:
    """`matched_auc` of each classifier; its note says what subjects, of conditions (S, K), are matched by."""
    pairs = comparable(rows[labels == 1], rows[labels == 0], about)
    if not pairs.any():
        return dict.fromkeys(scores, unknown("no two subjects of different classes have the same conditions"))
    known = np.isfinite(rows).mean(axis=0) > 0.5
    note = "matched by " + (", ".join(name for name, one in zip(about, known) if one) or "nothing")
    aucs = {name: matched_auc(labels, one[:, 1], pairs, drawn) for name, one in scores.items()}
    found = {name: replace(estimate(values), note=note) for name, values in aucs.items()}
    real = found["real"].value
    return {name: one if name == "real" else one.with_reference(real) for name, one in found.items()}


def matched_auc(labels: np.ndarray, scores: np.ndarray, pairs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """AUC (B + 1,) over pairs of subjects with the same covariates alone (Janes & Pepe 2009): what of the
    separation is not that of the covariates.

    Args:
        labels, scores: (S,), of subjects with a diagnosis; 1 for cases.
        pairs: bool (cases, others), which are compared.
        times: (B + 1, S), how often a bootstrap sample has the subject, as of `Resamples`.

    Returns:
        NaN in bootstrap samples without a pair.
    """
    cases, others = labels == 1, labels == 0
    wins = (np.sign(scores[cases][:, None] - scores[others][None, :]) + 1) / 2
    weights = [
        np.einsum("bc,co,bo->b", times[:, cases], part, times[:, others], optimize=True)
        for part in (pairs * wins, pairs.astype(float))
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        return weights[0] / weights[1]


def tstr_metrics(
    labels: np.ndarray,
    subjects: np.ndarray,
    scores: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, Estimate | dict[str, Estimate]]:
    """AUC and balanced accuracy of each classifier, and how much of the AUC training on samples keeps.

    Args:
        labels, subjects: (S,), of held-out subjects.
        scores: {"real", "synthetic", "both": probabilities (S, K)}, by what the classifier was trained on.

    Returns:
        {"real": {"auc": …, "balanced_accuracy": …}, "synthetic": …, "both": …, "relative_auc": …}. The
        reference of synthetic and both is the value of real. The last is (AUC synthetic - 0.5) ÷ (AUC real -
        0.5): a ratio of the AUCs themselves would give a classifier at chance half of the credit.
    """
    rows = list(Resamples.draw(subjects, draws, seed).rows())
    statistics = {"auc": auc, "balanced_accuracy": balanced_accuracy}
    found = {
        name: {
            metric: np.array([statistic(labels[chosen], one[chosen]) for chosen in rows])
            for metric, statistic in statistics.items()
        }
        for name, one in scores.items()
    }

    def with_note(values: np.ndarray) -> Estimate:
        one = estimate(values)
        constant = f"the same in every bootstrap sample: {len(labels)} subjects are too few for an interval"
        return replace(one, note=constant) if one.low is not None and one.low == one.high else one

    results = {
        name: {metric: with_note(values) for metric, values in one.items()} for name, one in found.items()
    }
    for name in ("synthetic", "both"):
        results[name] = {
            metric: value.with_reference(results["real"][metric].value)
            for metric, value in results[name].items()
        }
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = estimate((found["synthetic"]["auc"] - 0.5) / (found["real"]["auc"] - 0.5))
    if relative.low is not None and relative.low == relative.high:
        # No bootstrap sample has an error, which does not exclude one: 1 - 0.05^(1/n) is the exact bound.
        lowest = 2 * 0.05 ** (1 / np.bincount(labels).min()) - 1
        relative = replace(relative, low_90=min(relative.low, lowest * relative.value))
    return results | {"relative_auc": relative.with_reference(1.0)}


def subject_probabilities(model: nn.Module, images: ImageSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probabilities (S, K), label (S,) and subject (S,); one row per subject and diagnosis."""
    means = pd.DataFrame(probabilities(model, images)).groupby([images.subjects, images.labels]).mean()
    return (
        means.to_numpy(),
        means.index.get_level_values(1).to_numpy(),
        means.index.get_level_values(0).to_numpy(),
    )


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve; of more than two classes the mean of each against the rest (macro).

    Args:
        labels: (N,), in 0 … K - 1.
        scores: (N, K), the probability of each class.

    Returns:
        NaN where a class is missing.
    """
    classes = scores.shape[1]
    one_vs_rest = [
        roc_auc(scores[labels == label, label], scores[labels != label, label])
        for label in (range(classes) if classes > 2 else [1])
    ]
    return float(np.mean(one_vs_rest))


def balanced_accuracy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the classes of the share classified correctly; NaN where a class is missing."""
    correct = scores.argmax(axis=1) == labels
    counts, hits = (np.bincount(labels, one, scores.shape[1]) for one in (None, correct))
    return float(np.mean(hits / counts)) if counts.all() else np.nan
