"""Whose brain is it: copies of training images among samples, and whether the model's loss tells whose.

A sample is called a copy when it is nearer to one training subject's image than to the next subjects' by a
ratio (see nearest.py) that real slices of people whom the model never saw reach at a stated rate at most. The
ratio alone is used, since at the same rate of false alarms it finds more: of 100 copies at 32 pixels with
noise of a tenth of the range it found all, the plain distance 44 (phantom, 140 training subjects).

What it finds, and what it does not (phantom, 100 planted copies of each kind, 64 pixels, 1 % false alarms):
all that were exact, moved by up to 3 pixels, brighter, of another gamma, noisy, blurred, turned by 2 degrees,
or through the autoencoder; 99 scaled by 3 %; and 18 turned by 5 degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from adni_ldm.evaluation.estimates import FEWEST_SUBJECTS, Estimate, bootstrap, proportion, unknown
from adni_ldm.evaluation.image_sets import ImageSet, thin
from adni_ldm.evaluation.model_outputs import denoising_losses
from adni_ldm.evaluation.nearest_neighbors import (
    SURROUNDINGS,
    Neighbours,
    nearest_in_features,
    nearest_in_pixels,
)
from adni_ldm.pipeline import ClassConditionalLDMPipeline

FALSE_ALARMS = 0.01  # share of real slices of other people that may be called copies
MOST_FALSE_ALARMS = 0.1  # where held-out slices are too few for 1 %, up to this


@dataclass(frozen=True)
class CopyRule:
    """A picture is a copy where its ratio is below `threshold`."""

    threshold: float
    false_alarms: float  # share of new people's slices that the limit was set to call copies, at most
    slices: int  # held-out, that the threshold was set by
    subjects: int

    def calls(self, ratios: np.ndarray) -> np.ndarray:
        return ratios < self.threshold

    def __str__(self) -> str:
        return (
            "A picture is called a copy when its distance to the nearest training slice is less than "
            f"{self.threshold:.2f} of the mean distance to the next {SURROUNDINGS} subjects' nearest slices. "
            f"The limit was set by {self.slices} real slices of {self.subjects} subjects held out of "
            f"training, so that at most {self.false_alarms:.1%} of such slices are below it. The floor is "
            "the share of them called copies when each subject is judged by the limit that the others set."
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
    subject: str  # whose training image it is: not for a report that is passed on
    person: int  # that subject's number among the pairs, from 1
    place: int  # which of the subject's training slices, from 1
    label: int  # class that the sample was drawn as


@dataclass(frozen=True)
class Privacy:
    """What was found: figures, and what the pictures are made of."""

    figures: dict[str, Estimate]
    rule: CopyRule | None  # None where copies cannot be told from others
    samples: Neighbours
    held_out: Neighbours
    pairs: list[Pair]


def examine(
    samples: ImageSet,
    train: ImageSet,
    held_out: ImageSet,
    features: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    pipeline: ClassConditionalLDMPipeline | None = None,
    most: int = 300,
    seed: int = 0,
) -> Privacy:
    """Copies among the samples, the nearest pairs, and a membership test.

    Args:
        train: all that the model was trained on; a slice that is left out cannot be found again.
        held_out: real slices of subjects that it was not trained on.
        features: (N, D) of samples, train and held_out: adds `copies_in_features`.
        pipeline: the model that drew the samples: adds `membership_auc`.
        most: slices of either side that the model's loss is taken of, the same share of every subject's.
    """
    near = nearest_in_pixels(samples.images, train.images, train.subjects)
    near_held_out = nearest_in_pixels(held_out.images, train.images, train.subjects)
    figures, rule = copy_figures(near, samples, near_held_out, held_out, train)
    if features is not None:
        of_samples, of_train, of_held_out = features
        found, _ = copy_figures(
            nearest_in_features(of_samples, of_train, train.subjects),
            samples,
            nearest_in_features(of_held_out, of_train, train.subjects),
            held_out,
            train,
        )
        figures["copies_in_features"] = found["copies"]
    if pipeline is not None:
        chosen = [one.take(thin(one.subjects, most, seed)) for one in (train, held_out)]
        members, others = (denoising_losses(pipeline, one, seed=seed) for one in chosen)
        figures["membership_auc"] = membership_auc(members, chosen[0].subjects, others, chosen[1].subjects)
    return Privacy(figures, rule, near, near_held_out, nearest_pairs(near, samples, train, rule))


def calibrate(ratios: np.ndarray, subjects: np.ndarray, false_alarms: float = FALSE_ALARMS) -> CopyRule:
    """The limit that new people's slices fall below at a rate of `false_alarms` at most.

    The k-th smallest of n held-out ratios, k = ⌊rate · (n + 1)⌋: split conformal prediction (Vovk et al.
    2005). Fewer slices than 1 / rate - 1 give the smallest ratio as limit, and the rate 1 / (n + 1). It holds
    on average over cohorts where slices are exchangeable. Those of one subject are more alike than that,
    which is why the floor is measured by subject: see `falsely_called`.
    """
    count = len(ratios)
    rank = max(1, int(false_alarms * (count + 1)))
    limit = np.sort(ratios)[rank - 1]
    rate = max(false_alarms, 1 / (count + 1))
    return CopyRule(float(limit), rate, count, len(np.unique(subjects)))


def falsely_called(ratios: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    """Which held-out slices (N,) are called copies, each subject by the limit that the other subjects set."""
    called = np.zeros(len(ratios), dtype=bool)
    for subject in np.unique(subjects):
        own = subjects == subject
        called[own] = calibrate(ratios[~own], subjects[~own]).calls(ratios[own])
    return called


def copy_figures(
    samples: Neighbours,
    sample_set: ImageSet,
    held_out: Neighbours,
    held_out_set: ImageSet,
    train_set: ImageSet,
) -> tuple[dict[str, Estimate], CopyRule | None]:
    """Share of copies among the samples, its floor the share among held-out real slices.

    Returns:
        `copies`, `copies_CLASS` for each class (share of samples, Wilson's interval), and `subjects_copied`:
        the share of training subjects of whom a sample is a copy, beside what false alarms alone would give.
        And the rule; None where nothing can be said, with the figures' notes saying why.
    """
    names = train_set.class_names
    keys = ["copies", *(f"copies_{name}" for name in names), "subjects_copied"]
    rule, gap = None, _gap(held_out_set, train_set)
    if not gap:
        rule = calibrate(held_out.ratios, held_out_set.subjects)
        if rule.threshold == 0:
            same = int((held_out.ratios == 0).sum())
            gap = f"{same} held-out slices are training slices: nothing tells a copy from them"
    if gap:
        return {key: unknown(gap) for key in keys}, None

    called = rule.calls(samples.ratios)
    falsely = falsely_called(held_out.ratios, held_out_set.subjects)
    figures = {"copies": _share(called, falsely, "no samples")}
    for label, name in enumerate(names):
        of_class = sample_set.labels == label
        of_held_out = held_out_set.labels == label
        figures[f"copies_{name}"] = _share(called[of_class], falsely[of_held_out], f"no samples of {name}")

    people = len(np.unique(train_set.subjects))
    copied = len(np.unique(train_set.subjects[samples.rows[called]]))
    by_chance = 1 - (1 - falsely.mean() / people) ** len(called)  # false alarms fall on anyone alike
    figures["subjects_copied"] = (
        proportion(copied, people).with_floor(by_chance) if len(called) else unknown("no samples")
    )
    return figures, rule


def _share(called: np.ndarray, falsely: np.ndarray, if_none: str) -> Estimate:
    if not len(called):
        return unknown(if_none)
    return proportion(int(called.sum()), len(called)).with_floor(falsely.mean() if len(falsely) else None)


def _gap(held_out_set: ImageSet, train_set: ImageSet) -> str:
    """Why copies cannot be told from others; empty where they can."""
    subjects, trained = (len(np.unique(one.subjects)) for one in (held_out_set, train_set))
    if trained < 2:
        return "all training slices are one subject's: whom a sample is nearest to says nothing"
    if subjects < 2:
        return f"{subjects} subjects held out of training: 2 at least tell how near new people come"
    if 1 / (len(held_out_set) + 1) > MOST_FALSE_ALARMS:
        return (
            f"{len(held_out_set)} slices held out of training: too few to keep false alarms "
            f"below {MOST_FALSE_ALARMS:.0%}"
        )
    return ""


def nearest_pairs(
    samples: Neighbours, sample_set: ImageSet, train_set: ImageSet, rule: CopyRule | None, count: int = 10
) -> list[Pair]:
    """The samples that are most like copies, the worst first, by the ratio and then by the distance."""
    people: dict[str, int] = {}
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
                is_copy=rule is not None and bool(rule.calls(samples.ratios[sample])),
                subject=subject,
                person=people.setdefault(subject, len(people) + 1),
                place=int((train_set.subjects[: row + 1] == subject).sum()),
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
    """How well the model's loss tells subjects it was trained on from others: AUC over subjects.

    The probability that a training subject's mean loss is below that of a subject never seen (Yeom et al.
    2018, arXiv:1709.01604): 0.5 tells nothing, 1 tells all; the floor is 0.5. The interval is a bootstrap
    over the subjects of both sides. Losses (N,), (M,), with the subject of each.
    """
    members = _mean_by_subject(member_losses, member_subjects)
    others = _mean_by_subject(other_losses, other_subjects)
    if min(len(members), len(others)) < FEWEST_SUBJECTS:
        return unknown(
            f"{len(members)} training and {len(others)} held-out subjects: it takes {FEWEST_SUBJECTS} of each"
        )

    def auc(first: np.ndarray, second: np.ndarray) -> float:
        wins = stats.mannwhitneyu(others[second], members[first]).statistic
        return wins / (len(first) * len(second))

    rows = np.arange(len(members)), np.arange(len(others))
    return Estimate(auc(*rows), *bootstrap(auc, *rows), floor=0.5)


def _mean_by_subject(values: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    _, codes = np.unique(subjects, return_inverse=True)
    return np.bincount(codes, values) / np.bincount(codes)
