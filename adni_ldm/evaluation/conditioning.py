"""Class-conditioning accuracy: how often a classifier trained on real slices recognizes a sample's class.

A model that ignores its label can have a perfect FID over all samples; its class-conditioning accuracy is at
chance level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from adni_ldm.evaluation.classifier import probabilities
from adni_ldm.evaluation.estimates import (
    Estimate,
    Resamples,
    estimate,
    proportion,
    unknown,
)
from adni_ldm.evaluation.image_sets import ImageSet, too_few


def class_conditioning_accuracy(
    classifier: nn.Module, samples: ImageSet, held_out: ImageSet, draws: int = 1000
) -> dict[str, Estimate]:
    """Share of samples that the classifier assigns to the class they were conditioned on, "all" and by class.

    Args:
        classifier: trained on real slices of the training subjects.
        held_out: real slices of other subjects. The reference is the classifier's accuracy on them; for "all"
            classes are weighted by their share among the samples.

    Returns:
        As `accuracy_metrics`.
    """
    hits, real_hits = (probabilities(classifier, one).argmax(1) == one.labels for one in (samples, held_out))
    return accuracy_metrics(hits, samples, real_hits, held_out, draws)


def accuracy_metrics(
    hits: np.ndarray, samples: ImageSet, real_hits: np.ndarray, held_out: ImageSet, draws: int = 1000
) -> dict[str, Estimate]:
    """The accuracies, from which samples (N,) and held-out slices (M,) the classifier assigns correctly.

    "relative" is (accuracy on samples - chance) ÷ (accuracy on held-out slices - chance), both balanced, the
    mean over the classes, with chance 1 / K. Its interval resamples samples and held-out subjects. It has no
    value with too few of them, or if the classifier is not reliably above chance on real slices.
    """
    results, expected = {}, 0.0  # hits expected among real slices with the samples' class frequencies
    drawn = np.zeros((2, draws + 1))  # balanced accuracy on samples and on real slices
    for label, name in enumerate(samples.class_names):
        of_class, real = samples.labels == label, held_out.labels == label
        share = of_class.mean()
        reference = real_hits[real].mean() if real.any() else math.nan
        if not of_class.any():
            results[name] = unknown(f"no samples of {name}").with_reference(reference)
            continue
        count = int(of_class.sum())
        results[name] = proportion(int(hits[of_class].sum()), count).with_reference(reference)
        expected += share * reference
        for which, (one, rows, correct) in enumerate(
            ((samples, of_class, hits), (held_out, real, real_hits))
        ):
            mean = Resamples.draw(one.subjects[rows], draws, [which, label]).mean(correct[rows])
            drawn[which] += mean / len(samples.class_names)
    chance = 1 / len(samples.class_names)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = estimate((drawn[0] - chance) / (drawn[1] - chance)).with_reference(1.0)
    on_real = estimate(drawn[1])
    if on_real.low is not None and on_real.low <= chance:
        relative = unknown("on real slices the classifier is not reliably above chance")
    if hits.all() and relative.low_90 is not None:
        # No bootstrap sample has an error, which Wilson's interval does not exclude.
        lowest = (proportion(len(hits), len(hits)).low_90 - chance) / (1 - chance)
        relative = replace(relative, low_90=min(relative.low_90, lowest))
    if problem := too_few(samples, held_out):
        relative = unknown(problem)
    return {
        "all": proportion(int(hits.sum()), len(hits)).with_reference(expected),
        "relative": relative,
        **results,
    }


def class_conditioning_accuracy_by_guidance(
    classifier: nn.Module,
    generate: Callable[[float], ImageSet],
    scales: Sequence[float],
    held_out: ImageSet,
) -> dict[float, Estimate]:
    """Accuracy over all classes at each guidance scale; `generate` takes the scale and returns samples."""
    return {
        scale: class_conditioning_accuracy(classifier, generate(scale), held_out, 0)["all"]
        for scale in scales
    }
