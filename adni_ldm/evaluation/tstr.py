"""Whether samples are of use: a classifier trained on them, tested on real subjects that no model saw.

The unit of testing is the subject: the mean of the probabilities of a subject's slices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import nn

from adni_ldm.evaluation.classifier import STEPS, probabilities, train_classifier
from adni_ldm.evaluation.estimates import FEWEST_SUBJECTS, Estimate, bootstrap, unknown
from adni_ldm.evaluation.image_sets import ImageSet, join


def usefulness(
    judge: nn.Module,
    train: ImageSet,
    samples: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = STEPS,
    draws: int = 1000,
) -> dict[str, Estimate | dict[str, Estimate]]:
    """AUC and balanced accuracy by subject, of classifiers trained on real slices, on samples and on both.

    All three have the same network, seed and number of steps. Intervals draw the held-out subjects anew.

    Args:
        judge: what `train_classifier` returned for `train`, with `seed` and `steps`.
        train: real slices of the subjects that the model was trained on.
        held_out: real slices of other subjects, of every class.

    Returns:
        {"real": {"auc": …, "balanced_accuracy": …}, "synthetic": …, "both": …, "auc_ratio": …}, where the
        floor of what samples reach is what real slices reach, and the ratio is AUC synthetic / AUC real.
        Unknown where a class lacks samples or has fewer than FEWEST_SUBJECTS held-out subjects.
    """
    problem = _too_few(samples, held_out)
    if problem:
        gap = {"auc": unknown(problem), "balanced_accuracy": unknown(problem)}
        return {"real": gap, "synthetic": gap, "both": gap, "auc_ratio": unknown(problem)}

    def fit(images: ImageSet, what: str) -> nn.Module:
        description = f"Training a classifier on {what}"
        return train_classifier(images, seed=seed, device=device, steps=steps, description=description)

    classifiers = {
        "real": judge,
        "synthetic": fit(samples, "samples"),
        "both": fit(join(train, samples), "both"),
    }
    by_subject = {name: subject_probabilities(model, held_out) for name, model in classifiers.items()}
    _, labels, subjects = by_subject["real"]
    scores = {name: scored[0] for name, scored in by_subject.items()}  # (subjects, K)

    def estimate(statistic: Callable[[np.ndarray], float]) -> Estimate:
        everyone = np.arange(len(labels))
        low, high = bootstrap(statistic, subjects, count=draws, seed=seed)
        certain = f"alike in every draw: {len(labels)} subjects are too few to show the doubt that is left"
        return Estimate(statistic(everyone), low, high, note=certain if low == high else "")

    def figures(name: str) -> dict[str, Estimate]:
        return {
            "auc": estimate(lambda rows: auc(labels[rows], scores[name][rows])),
            "balanced_accuracy": estimate(lambda rows: balanced_accuracy(labels[rows], scores[name][rows])),
        }

    results = {name: figures(name) for name in classifiers}
    for name in ("synthetic", "both"):
        results[name] = {key: e.with_floor(results["real"][key].value) for key, e in results[name].items()}
    results["auc_ratio"] = estimate(
        lambda rows: ratio(
            auc(labels[rows], scores["synthetic"][rows]), auc(labels[rows], scores["real"][rows])
        )
    )
    return results


def subject_probabilities(model: nn.Module, images: ImageSet) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probabilities (S, K), label (S,) and subject (S,) of each subject; one row for each diagnosis."""
    means = pd.DataFrame(probabilities(model, images)).groupby([images.subjects, images.labels]).mean()
    return (
        means.to_numpy(),
        means.index.get_level_values(1).to_numpy(),
        means.index.get_level_values(0).to_numpy(),
    )


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve, the chance that a case of a class scores higher than another; of more than
    two classes the mean of each against the rest.

    Args:
        labels: (N,), each one of 0 … K - 1.
        scores: (N, K), the probability of each class.

    Returns:
        NaN where a class is not shown.
    """
    areas = []
    classes = scores.shape[1]
    for label in range(classes) if classes > 2 else [1]:
        cases, others = scores[labels == label, label], scores[labels != label, label]
        if not len(cases) or not len(others):
            return np.nan
        difference = cases[:, None] - others
        areas.append((difference > 0).mean() + (difference == 0).mean() / 2)
    return float(np.mean(areas))


def ratio(one: float, other: float) -> float:
    """NaN where there is nothing to divide by."""
    return one / other if other else np.nan


def balanced_accuracy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the classes of the share that is told rightly; NaN where a class is not shown."""
    right = scores.argmax(axis=1) == labels
    shown = [right[labels == label] for label in range(scores.shape[1])]
    return float(np.mean([one.mean() for one in shown])) if all(map(len, shown)) else np.nan


def _too_few(samples: ImageSet, held_out: ImageSet) -> str:
    """What there is too little of; "" where there is enough."""
    for name in held_out.class_names:
        if not len(samples.of_class(name)):
            return f"no samples of {name}"
        subjects = len(np.unique(held_out.of_class(name).subjects))
        if subjects < FEWEST_SUBJECTS:
            return f"{subjects} held-out subjects of {name}, where {FEWEST_SUBJECTS} are needed"
    return ""
