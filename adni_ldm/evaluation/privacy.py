"""Memorization: copies of training images among samples, and membership inference from the model's loss.

A sample is classified as a copy when it is nearer to one training subject's image than to those of the next
subjects, by a ratio (see nearest_neighbors.py) whose limit is set by real slices of held-out subjects at a
stated false-positive rate. The ratio alone is used: at the same rate it detected all of 100 copies at 32
pixels with noise of a tenth of the range, the plain distance 44 (phantom, 140 training subjects).

Sensitivity (phantom, 100 planted copies of each kind, 64 pixels, 1 % false positives): all copies that were
exact, shifted by up to 3 pixels, brighter, of another gamma, noisy, blurred, rotated by up to 6 degrees or
passed through the autoencoder; 99 scaled by 3 %; and 66 rotated by 8 degrees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from adni_ldm.evaluation.covariates import comparable, rows_of
from adni_ldm.evaluation.estimates import (
    FEWEST_SUBJECTS,
    Estimate,
    Resamples,
    clustered_proportion,
    difference_of_proportions,
    estimate,
    proportion,
    roc_auc,
    unknown,
)
from adni_ldm.evaluation.image_sets import ImageSet, thin
from adni_ldm.evaluation.model_outputs import denoising_losses
from adni_ldm.evaluation.nearest_neighbors import NEXT_SUBJECTS, Neighbors, nearest_in_pixels
from adni_ldm.pipeline import ClassConditionalLDMPipeline

FALSE_POSITIVES = 0.01  # rate at which real slices of held-out subjects may be classified as copies
NEARER = 0.5  # a sample below this share of the smallest held-out ratio is a copy beyond doubt
COPIES_MARGIN = 0.02  # by which the share of copies may exceed the reference
MOST_FALSE_POSITIVES = 0.1  # highest rate that is accepted where held-out slices are too few for 1 %


@dataclass(frozen=True)
class CopyRule:
    """A slice is classified as a copy where its ratio is below `threshold`."""

    threshold: float
    false_positive_rate: float  # of real slices of new subjects, at most
    slices: int  # held-out slices that the threshold was set by
    subjects: int  # of those slices

    def is_copy(self, ratios: np.ndarray) -> np.ndarray:
        return ratios < self.threshold

    def __str__(self) -> str:
        return (
            "A slice is classified as a copy if its distance to the nearest training slice is less than "
            f"{self.threshold:.2f} times the mean distance to the nearest slices of the next {NEXT_SUBJECTS} "
            f"subjects. The threshold was set on {self.slices} real slices of {self.subjects} held-out "
            f"subjects, for a false-positive rate of at most {self.false_positive_rate:.1%}. The reference "
            "is their false-positive rate when the threshold for each subject is set on the other subjects."
        )


@dataclass(frozen=True)
class Pair:
    """A sample and the training image nearest to it."""

    sample: int  # row
    training: int  # row
    distance: float
    ratio: float
    shift: tuple[int, int]  # pixels down and right from the training image to the sample
    is_copy: bool
    subject: str  # ID of the training subject; must not appear in a report
    subject_number: int  # stands for the ID: a number among the pairs, from 1
    slice_number: int  # of the subject's training slices, from 1
    label: int  # class that the sample was conditioned on


@dataclass(frozen=True)
class Memorization:
    """Estimates of memorization, and what the report's figures are made of."""

    metrics: dict[str, Estimate]
    rule: CopyRule | None  # None where copies cannot be identified
    samples: Neighbors
    held_out: Neighbors
    pairs: list[Pair]


def measure_memorization(
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    pipeline: ClassConditionalLDMPipeline | None = None,
    most: int = 300,
    seed: int = 0,
    about: Mapping[str, Mapping] | None = None,
) -> Memorization:
    """Share of copies among the samples, the nearest pairs, and membership inference.

    Args:
        train: every slice that the model was trained on; copies of one that is left out are not found. Label
            -1: of a class that the model does not generate.
        held_out: real slices of subjects that it was not trained on.
        pipeline: the model that generated the samples: adds `membership_auc`.
        most: slices of either set that the model's loss is computed on, the same share of every subject's.
        about: description of the conditions that samples were asked for: adds `matched_copies`, as
            `copies`, and its like, of a search among the training slices with the same conditions alone.
    """
    near = nearest_in_pixels(samples.images, train.images, train.subjects)
    near_held_out = nearest_in_pixels(held_out.images, train.images, train.subjects)
    metrics, rule = copy_metrics(near, samples, near_held_out, held_out, train)
    if about:
        rows = rows_of(train, about)
        allowed = [comparable(rows_of(one, about), rows, about) for one in (samples, held_out)]
        matched = nearest_in_pixels(samples.images, train.images, train.subjects, allowed[0])
        matched_held_out = nearest_in_pixels(held_out.images, train.images, train.subjects, allowed[1])
        found, _ = copy_metrics(matched, samples, matched_held_out, held_out, train)
        metrics |= {f"matched_{name}": found[name] for name in ("copies", "near_copies", "copies_excess")}
    if pipeline is not None:
        members = train.take(train.labels >= 0)  # the model has no tokens of other classes
        chosen = [one.take(thin(one.subjects, most, seed)) for one in (members, held_out)]
        members, others = (denoising_losses(pipeline, one, seed=seed) for one in chosen)
        metrics["membership_auc"] = membership_auc(members, chosen[0].subjects, others, chosen[1].subjects)
    return Memorization(metrics, rule, near, near_held_out, nearest_pairs(near, samples, train, rule))


def calibrate(ratios: np.ndarray, subjects: np.ndarray, rate: float = FALSE_POSITIVES) -> CopyRule:
    """The threshold below which the ratios of new subjects' slices fall at a rate of at most `rate`.

    The k-th smallest of n held-out ratios, k = ⌊rate · (n + 1)⌋: split conformal prediction (Vovk et al.
    2005). With fewer than 1 / rate - 1 slices it is the smallest ratio, and the rate is 1 / (n + 1). The rate
    holds on average over cohorts of exchangeable slices. Slices of one subject resemble each other more than
    that, so the reference is measured by subject: see `cross_validated_false_positives`.
    """
    count = len(ratios)
    rank = max(1, int(rate * (count + 1)))
    threshold = np.sort(ratios)[rank - 1]
    return CopyRule(float(threshold), max(rate, 1 / (count + 1)), count, len(np.unique(subjects)))


def cross_validated_false_positives(ratios: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Which held-out slices (N,) are classified as copies by the rule of the other subjects."""
    positive = np.zeros(len(ratios), dtype=bool)
    for subject in np.unique(subjects):
        own = subjects == subject
        positive[own] = calibrate(ratios[~own], subjects[~own]).is_copy(ratios[own])
    return positive


def copy_metrics(
    samples: Neighbors,
    sample_set: ImageSet,
    held_out: Neighbors,
    held_out_set: ImageSet,
    train_set: ImageSet,
) -> tuple[dict[str, Estimate], CopyRule | None]:
    """Share of copies among the samples; the reference is the share among real held-out slices.

    Returns:
        `copies`, `copies_CLASS` for each class (share of samples, Wilson's interval); `near_copies`, the
        share that is nearer than any held-out slice by a factor of two; `copies_excess`, the
        share less the reference, whose interval has the error of both; and `subjects_copied`:
        the share of training subjects with at least one copy, and as reference the share that false positives
        alone would give. And the rule; None where copies cannot be identified, for the reason in the notes.
    """
    names = train_set.class_names
    keys = [
        "copies",
        "near_copies",
        "copies_excess",
        *(f"copies_{name}" for name in names),
        "subjects_copied",
    ]
    rule, gap = None, _gap(held_out_set, train_set)
    if not gap:
        rule = calibrate(held_out.ratios, held_out_set.subjects)
        if rule.threshold == 0:
            same = int((held_out.ratios == 0).sum())
            gap = f"{same} held-out slices are identical to training slices, so no threshold can be set"
    if gap:
        return {key: unknown(gap) for key in keys}, None

    copies = rule.is_copy(samples.ratios)
    false_positives = cross_validated_false_positives(held_out.ratios, held_out_set.subjects)
    metrics = {"copies": _share(copies, false_positives, "no samples")}
    metrics["near_copies"] = proportion(
        int((samples.ratios < NEARER * held_out.ratios.min()).sum()), len(copies)
    ).with_reference(0.0)
    metrics["copies_excess"] = _excess(metrics["copies"], len(copies), false_positives, held_out_set.subjects)
    for label, name in enumerate(names):
        of_class = sample_set.labels == label
        of_held_out = false_positives[held_out_set.labels == label]
        metrics[f"copies_{name}"] = _share(copies[of_class], of_held_out, f"no samples of {name}")

    subjects = len(np.unique(train_set.subjects))
    copied = len(np.unique(train_set.subjects[samples.rows[copies]]))
    # Expected by chance: false positives are spread evenly over the training subjects.
    by_chance = 1 - (1 - false_positives.mean() / subjects) ** len(copies)
    metrics["subjects_copied"] = (
        proportion(copied, subjects).with_reference(by_chance) if len(copies) else unknown("no samples")
    )
    return metrics, rule


def _share(copies: np.ndarray, false_positives: np.ndarray, if_none: str) -> Estimate:
    if not len(copies):
        return unknown(if_none)
    reference = false_positives.mean() if len(false_positives) else None
    return proportion(int(copies.sum()), len(copies)).with_reference(reference)


def _excess(
    copies: Estimate, count: int, false_positives: np.ndarray, held_out_subjects: np.ndarray
) -> Estimate:
    """Share of copies less that of false positives; the note gives the number of samples that would
    decide."""
    if not count:
        return unknown(copies.note)
    if (subjects := len(np.unique(held_out_subjects))) < FEWEST_SUBJECTS:
        return unknown(f"{subjects} held-out subjects: at least {FEWEST_SUBJECTS} are needed")
    reference = clustered_proportion(false_positives, held_out_subjects)
    excess = difference_of_proportions(copies, reference)
    if excess.low > 0 or excess.high <= COPIES_MARGIN:
        return excess
    more = (int(count * 2 ** (k / 2)) for k in range(1, 40))
    for number in more:
        if (
            difference_of_proportions(proportion(copies.value * number, number), reference).high
            <= COPIES_MARGIN
        ):
            return replace(excess, note=f"about {number} samples would decide, at this share of copies")
    return replace(excess, note="more held-out subjects would be needed to decide")


def _gap(held_out_set: ImageSet, train_set: ImageSet) -> str:
    """Why copies cannot be identified; empty where they can."""
    subjects, trained = (len(np.unique(one.subjects)) for one in (held_out_set, train_set))
    if trained < 2:
        return "all training slices are of one subject, so distances cannot be compared between subjects"
    if subjects < 2:
        return f"{subjects} held-out subjects: at least 2 are needed to set the threshold for copies"
    if 1 / (len(held_out_set) + 1) > MOST_FALSE_POSITIVES:
        return (
            f"{len(held_out_set)} held-out slices: too few for a false-positive rate "
            f"below {MOST_FALSE_POSITIVES:.0%}"
        )
    return ""


def nearest_pairs(
    samples: Neighbors, sample_set: ImageSet, train_set: ImageSet, rule: CopyRule | None, count: int = 10
) -> list[Pair]:
    """The samples most like copies, by increasing ratio and then distance, with their training images."""
    numbers: dict[str, int] = {}
    pairs = []
    for sample in np.lexsort((samples.distances, samples.ratios))[:count]:
        row = samples.rows[sample]
        subject = str(train_set.subjects[row])
        pairs.append(
            Pair(
                sample=int(sample),
                training=int(row),
                distance=float(samples.distances[sample]),
                ratio=float(samples.ratios[sample]),
                shift=tuple(samples.shifts[sample].tolist()),
                is_copy=rule is not None and bool(rule.is_copy(samples.ratios[sample])),
                subject=subject,
                subject_number=numbers.setdefault(subject, len(numbers) + 1),
                slice_number=int((train_set.subjects[: row + 1] == subject).sum()),
                label=int(sample_set.labels[sample]),
            )
        )
    return pairs


def membership_auc(
    member_losses: np.ndarray,
    member_subjects: np.ndarray,
    other_losses: np.ndarray,
    other_subjects: np.ndarray,
) -> Estimate:
    """Membership inference from the model's loss (Yeom et al. 2018, arXiv:1709.01604): AUC over subjects.

    The probability that the mean loss of a training subject is below that of a subject that was not trained
    on; the reference is 0.5, chance. The interval resamples subjects of both sets. Losses (N,) and (M,), with
    the subject of each.
    """
    members = _mean_by_subject(member_losses, member_subjects)
    others = _mean_by_subject(other_losses, other_subjects)
    if min(len(members), len(others)) < FEWEST_SUBJECTS:
        counts = f"{len(members)} training and {len(others)} held-out subjects"
        return unknown(f"{counts}: at least {FEWEST_SUBJECTS} of each are needed")

    samples = (Resamples.draw(range(len(one)), 1000, seed) for seed, one in enumerate((members, others)))
    pairs = zip(*(one.rows() for one in samples), strict=True)
    values = np.array([roc_auc(others[second], members[first]) for first, second in pairs])
    return estimate(values).with_reference(0.5)


def _mean_by_subject(values: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    _, codes = np.unique(subjects, return_inverse=True)
    return np.bincount(codes, values) / np.bincount(codes)
