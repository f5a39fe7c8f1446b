"""Class-conditioning accuracy: how often a classifier trained on real slices recognizes a sample's class.

A model that ignores its label can have a perfect FID over all samples; its class-conditioning accuracy is at
chance level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from adni_ldm.evaluation.classifier import probabilities
from adni_ldm.evaluation.estimates import Estimate, proportion, unknown
from adni_ldm.evaluation.image_sets import ImageSet


def class_conditioning_accuracy(
    classifier: nn.Module, samples: ImageSet, held_out: ImageSet
) -> dict[str, Estimate]:
    """Share of samples that the classifier assigns to the class they were conditioned on, "all" and by class.

    Args:
        classifier: trained on real slices of the training subjects.
        held_out: real slices of other subjects. The reference is the classifier's accuracy on them; for "all"
            classes are weighted by their share among the samples.
    """
    hits, real_hits = (probabilities(classifier, one).argmax(1) == one.labels for one in (samples, held_out))
    results, expected = {}, 0.0  # hits expected among real slices with the samples' class frequencies
    for label, name in enumerate(samples.class_names):
        of_class, real = hits[samples.labels == label], real_hits[held_out.labels == label]
        reference = real.mean() if len(real) else math.nan
        if len(of_class):
            results[name] = proportion(int(of_class.sum()), len(of_class)).with_reference(reference)
            expected += len(of_class) * reference
        else:
            results[name] = unknown(f"no samples of {name}").with_reference(reference)
    return {"all": proportion(int(hits.sum()), len(hits)).with_reference(expected / len(hits)), **results}


def class_conditioning_accuracy_by_guidance(
    classifier: nn.Module,
    generate: Callable[[float], ImageSet],
    scales: Sequence[float],
    held_out: ImageSet,
) -> dict[float, Estimate]:
    """Accuracy over all classes at each guidance scale; `generate` takes the scale and returns samples."""
    return {
        scale: class_conditioning_accuracy(classifier, generate(scale), held_out)["all"] for scale in scales
    }
