"""Whether samples show the class they were drawn for, judged by a classifier trained on real slices.

A model that ignores its label can have a perfect FID over all samples; this figure would be chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from adni_ldm.evaluation.classifier import probabilities
from adni_ldm.evaluation.estimates import Estimate, proportion, unknown
from adni_ldm.evaluation.image_sets import ImageSet


def agreement(classifier: nn.Module, samples: ImageSet, held_out: ImageSet) -> dict[str, Estimate]:
    """Share of samples that the classifier puts in the class they were drawn for, for "all" and by class.

    Args:
        classifier: trained on real slices of the training subjects.
        held_out: real slices of other subjects. The floor is the classifier's accuracy on them, for "all"
            with every class in the share that it has among the samples.
    """
    hits, real_hits = (probabilities(classifier, one).argmax(1) == one.labels for one in (samples, held_out))
    results, expected = {}, 0.0  # real slices told rightly, were they as many of each class as the samples
    for label, name in enumerate(samples.class_names):
        of_class, real = hits[samples.labels == label], real_hits[held_out.labels == label]
        floor = real.mean() if len(real) else math.nan
        if len(of_class):
            results[name] = proportion(int(of_class.sum()), len(of_class)).with_floor(floor)
            expected += len(of_class) * floor
        else:
            results[name] = unknown(f"no samples of {name}").with_floor(floor)
    return {"all": proportion(int(hits.sum()), len(hits)).with_floor(expected / len(hits)), **results}


def agreement_by_guidance(
    classifier: nn.Module,
    draw: Callable[[float], ImageSet],
    scales: Sequence[float],
    held_out: ImageSet,
) -> dict[float, Estimate]:
    """`agreement` over all classes at each guidance scale; `draw` makes samples at the scale it is given."""
    return {scale: agreement(classifier, draw(scale), held_out)["all"] for scale in scales}
