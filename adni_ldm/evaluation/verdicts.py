"""Verdicts: the answer to each question of the report, from criteria on its estimates and their intervals.

Yes only where the data show that every criterion is met, no only where they show that one is not, and
inconclusive otherwise: see `estimates.Criterion`. docs/metrics.md says how often each verdict is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from adni_ldm.evaluation.anatomy import MEASURES
from adni_ldm.evaluation.effects import COMPARED, NEGLIGIBLE
from adni_ldm.evaluation.estimates import Criterion, Estimate, decide, unknown
from adni_ldm.evaluation.fidelity import MANIFOLD
from adni_ldm.evaluation.privacy import COPIES_MARGIN

KID_SHARE = 0.05  # of the variance of real slices in the kernel's space
NEAR_REFERENCE = 0.8  # share of the reference that precision, recall, density and coverage must reach
LOCATION = 0.5  # difference of a class mean from that of real slices, in standard deviations
SPREAD = (0.85, 1.18)  # standard deviations within the classes, samples ÷ real
POWER = (0.8, 1.25)  # power of a frequency band, samples ÷ real
ABOVE_CHANCE = 0.8  # share of AUC - 0.5, and of accuracy - chance, that samples must keep
EFFECT = (0.7, 1.4)  # disease effect in samples ÷ in real slices
NO_EFFECT = 0.4  # Cohen's d that samples may have where real slices show that it is negligible
IDENTIFIED = (0.4, 0.6)  # AUC of membership inference outside of which subjects can be identified
HIDDEN = (0.35, 0.65)  # and inside of which its interval must lie for a favourable verdict


def verdicts(metrics: Mapping[str, Mapping]) -> dict[str, dict]:
    """{question: {"good": True, False or None if inconclusive, "text": …, "criteria": […]}} for each of
    QUESTIONS.

    Args:
        metrics: the sections fidelity, tstr, conditioning, anatomy, spectrum and privacy, of Estimates.
    """
    accuracy = metrics["conditioning"]["class_conditioning_accuracy"]
    return {
        "fidelity": _fidelity(metrics["fidelity"]["all"], metrics["anatomy"], metrics["spectrum"]["samples"]),
        "usefulness": _tstr(metrics["tstr"]),
        "faithfulness": _conditioning(accuracy, metrics["anatomy"]["ventricle_ratio"]),
        "privacy": _privacy(metrics["privacy"]),
    }


def _fidelity(features: Mapping[str, Estimate], anatomy: Mapping, power: Mapping[str, Estimate]) -> dict:
    criteria = list(fidelity_criteria(features, anatomy, power))
    kid = features["kid"]
    if kid.value is None:
        return _missing(kid, criteria)
    text = f"KID is {_with_interval(kid, '.3f')}, its reference {kid.reference:.3f}. "
    good = decide(criteria)
    text += {
        True: "In these features, in anatomy, spread and sharpness, samples are equivalent to slices of "
        "other subjects within the limits of the criteria. Up to a fifth of the samples may lie outside the "
        "real distribution, and differences outside these measures are not measured.",
        False: "The samples do not match the distribution of real slices.",
        None: "The data cannot decide.",
    }[good]
    return {"good": good, "text": text + _evidence(criteria), "criteria": _json(criteria)}


def fidelity_criteria(
    features: Mapping[str, Estimate], anatomy: Mapping, power: Mapping[str, Estimate]
) -> Iterator[Criterion]:
    """What samples must meet: in features, and in location, spread and sharpness of what they show.

    The spread is decided over all measures and classes together: of one measure in one class, a hundred
    subjects cannot show that it lies inside the limits. It counts by itself where a 99 % interval, since
    there are many, lies outside.
    """
    yield Criterion("KID ÷ variance of real slices", features["kid_share"], high=KID_SHARE)
    for name in MANIFOLD:
        yield Criterion(f"{name} ÷ reference", features[f"{name}_ratio"], low=NEAR_REFERENCE)
    for measure in COMPARED:
        label = MEASURES[measure].partition(",")[0]
        for name, one in anatomy[measure]["location"].items():
            yield Criterion(f"mean of {label} in {name}, difference in SD", one, -LOCATION, LOCATION)
        for name, one in anatomy[measure]["spread"].items():
            title = f"SD of {label} in {name} ÷ real"
            yield Criterion(title, one, *SPREAD, required=False, interval=_interval_99(one))
    yield Criterion("SD within classes ÷ real, over all measures", anatomy["spread"], *SPREAD)
    for band, one in power.items():
        yield Criterion(f"power {band} of Nyquist ÷ real", one, *POWER)


def _interval_99(ratio: Estimate) -> tuple[float, float] | None:
    """The 99 % interval of a ratio whose logarithm is normal, from its 90 % one; None where it has none."""
    if ratio.value is None or not ratio.low_90:
        return None
    widening = 2.576 / 1.645  # quantiles of the normal distribution
    low, high = (ratio.value * (one / ratio.value) ** widening for one in (ratio.low_90, ratio.high_90))
    return low, high


def _tstr(estimates: Mapping) -> dict:
    real, synthetic = estimates["real"]["auc"], estimates["synthetic"]["auc"]
    criteria = [Criterion("AUC above chance, samples ÷ real", estimates["relative_auc"], low=ABOVE_CHANCE)]
    if real.value is None or synthetic.value is None:
        return _missing(real if real.value is None else synthetic, criteria)
    text = (
        f"On held-out subjects, a classifier trained on samples alone reaches an AUC of "
        f"{_with_interval(synthetic, '.2f')}; trained on real slices, {_with_interval(real, '.2f')}. "
    )
    if real.low is None or real.low <= 0.5:
        text += "Trained on real slices it is not reliably above chance, so no conclusion can be drawn."
        return {"good": None, "text": text, "criteria": _json(criteria)}
    good = decide(criteria)
    text += {
        True: "The samples can replace the real slices in training this classifier. Whether they improve "
        "training beside real slices is not tested.",
        False: "The samples lose part of the difference between the classes.",
        None: "The data cannot decide.",
    }[good]
    return {"good": good, "text": text + _evidence(criteria), "criteria": _json(criteria)}


def _conditioning(accuracy: Mapping[str, Estimate], ventricle: Mapping) -> dict:
    every, effect, d = accuracy["all"], ventricle["effect_ratio"], ventricle["effect_real"]
    criteria = [Criterion("accuracy above chance, samples ÷ real", accuracy["relative"], low=ABOVE_CHANCE)]
    negligible = Criterion("", d, -NEGLIGIBLE, NEGLIGIBLE).met is True
    if negligible:
        found = ventricle["effect_synthetic"]
        criteria.append(
            Criterion("disease effect on the ventricles in samples", found, -NO_EFFECT, NO_EFFECT)
        )
    else:
        criteria.append(Criterion("disease effect on the ventricles, samples ÷ real", effect, *EFFECT))
    if every.value is None or every.reference is None:
        return _missing(every, criteria)
    text = (
        f"Class-conditioning accuracy, the share of samples that an independent classifier assigns to their "
        f"class, is {_with_interval(every, '.0%')}; on held-out real slices the classifier is correct in "
        f"{every.reference:.0%}. "
    )
    if negligible:
        text += "Real slices show no effect of the disease on the ventricles, so none is to be preserved. "
    elif criteria[1].met is False:
        text += _why(effect, ventricle["difference_ratio"])
    good = decide(criteria)
    text += {
        True: "The samples reproduce the difference between the classes.",
        False: "Do not estimate effects of the disease from these samples.",
        None: "The data cannot decide.",
    }[good]
    return {"good": good, "text": text + _evidence(criteria), "criteria": _json(criteria)}


def _why(effect: Estimate, difference: Estimate) -> str:
    """Whether the difference of the means or the spread within the classes makes another Cohen's d."""
    if min(effect.value, difference.value) < 0.01:
        return "In samples the ventricles show no disease effect, or one of the other sign. "
    spread = difference.value / effect.value  # d is the difference over the spread
    strength = "exaggerated" if effect.value > 1 else "too weak"
    by_means = abs(math.log(difference.value)) >= abs(math.log(spread))
    cause = "the means make" if by_means else "the spread makes"
    return (
        f"Cohen's d of the ventricles is {strength}: {_with_interval(effect, '.2f')} times that in real "
        f"slices. The difference between the class means is {difference.value:.2f} and the standard "
        f"deviation within the classes {spread:.2f} times the real one: {cause} it. "
    )


def _privacy(estimates: Mapping) -> dict:
    """By the 95 % intervals: a missed copy costs more than a withheld yes."""
    copies, near, excess = (
        estimates.get(name) or unknown("") for name in ("copies", "near_copies", "copies_excess")
    )
    membership = estimates.get("membership_auc") or unknown("membership was not tested: give --model")
    matched = estimates.get("matched_copies_excess")  # where samples were asked for by conditions
    found = [excess] if matched is None else [excess, matched]
    near = max(near, estimates.get("matched_near_copies") or near, key=lambda one: one.value or 0)
    copied = bool(near.value) or any(one.low is not None and one.low > 0 for one in found)
    not_copied = all(one.high is not None and one.high <= COPIES_MARGIN for one in found)
    known = membership.low is not None and membership.high is not None
    identified = known and (membership.low > IDENTIFIED[1] or membership.high < IDENTIFIED[0])
    hidden = known and HIDDEN[0] <= membership.low and membership.high <= HIDDEN[1]
    unseen = estimates.get("unseen_cohorts", [])
    criteria = [  # with the limits that decide: others for a yes than for a no
        Criterion(
            "share of samples nearer than any real slice", near, high=0.0, interval=(near.value, near.value)
        ),
        Criterion(
            "share of copies less the reference",
            excess,
            high=0.0 if copied else COPIES_MARGIN,
            interval=(excess.low, excess.high),
        ),
        *(
            Criterion(
                "share of copies among the same conditions, less the reference",
                one,
                high=0.0 if copied else COPIES_MARGIN,
                interval=(one.low, one.high),
            )
            for one in found[1:]
        ),
        Criterion(
            "AUC of membership inference",
            membership,
            *(IDENTIFIED if identified else HIDDEN),
            interval=(membership.low, membership.high),
        ),
    ]
    text = ""
    if copies.value is not None and copies.reference is not None:
        text = (
            f"{_with_interval(copies, '.1%')} of the samples are classified as copies of a training slice; "
            f"so are {copies.reference:.1%} of the real slices of held-out subjects. "
        )
    if near.value:
        text += (
            f"{near.value:.1%} are nearer to a training slice than any held-out slice, by a factor of two. "
        )
    if membership.value is not None:
        text += f"Membership inference from the model's loss: AUC {_with_interval(membership, '.2f')}. "
    if copied or identified:
        good = False
        text += "Training subjects can be identified. " if identified else ""
        text += "Inspect the nearest pairs, and do not publish these samples or this model."
    elif not_copied and hidden and unseen == []:
        good = True
        text += (
            f"At most {excess.high:.1%} more of the samples are classified as copies than false positives "
            "explain. This does not prove that the model cannot reproduce a training image. Copies "
            "rotated by more than about 6 degrees, mirrored ones, or those of parts of a slice can be missed."
        )
    else:
        good = None
        text += "Whether training images are memorized cannot be decided" + _lacking(
            None if not_copied else excess, None if hidden else membership, unseen
        )
    return {"good": good, "text": text, "criteria": _json(criteria)}


def _lacking(excess: Estimate | None, membership: Estimate | None, unseen: Sequence[str] | None) -> str:
    """What would decide on privacy."""
    parts = []
    if excess is not None:
        parts.append(excess.note or "the interval of the share of copies is too wide")
    if membership is not None:
        low, high = HIDDEN
        wide = f"the AUC of membership inference may lie outside {low} to {high}; more subjects would decide"
        parts.append(membership.note or wide)
    if unseen is None:
        parts.append("it is not known what the model was trained on; give --model")
    elif unseen:
        parts.append(f"the model was also trained on {', '.join(unseen)}; give --also_trained_on")
    return ": " + "; ".join(parts) + "."


def _evidence(criteria: Sequence[Criterion], most: int = 4) -> str:
    """The criteria that decided against, or that are undecided, and what would decide."""
    failed = [one for one in criteria if one.met is False]
    text = _listed(" Not met: ", failed, most)
    if not failed:
        undecided = [one for one in criteria if one.met is None and one.required]
        text += _listed(" Undecided: ", undecided, most)
        factors = [one.more_data for one in undecided]
        if factors and all(factors):
            text += f" About {max(factors):.2g} times as many subjects and samples would decide."
    return text


def _listed(title: str, criteria: Sequence[Criterion], most: int) -> str:
    if not criteria:
        return ""
    rest = f"; and {len(criteria) - most} more" if len(criteria) > most else ""
    return title + "; ".join(str(one) for one in criteria[:most]) + rest + "."


def _missing(found: Estimate, criteria: Sequence[Criterion]) -> dict:
    reason = found.note or "there are no real slices to compare with"
    return {"good": None, "text": f"Cannot be determined: {reason}.", "criteria": _json(criteria)}


def _json(criteria: Sequence[Criterion]) -> list[dict]:
    return [one.to_json() for one in criteria]


def _with_interval(found: Estimate, form: str) -> str:
    text = format(found.value, form)
    if found.low is None:
        return text
    return f"{text} (95 % CI {found.low:{form}} to {found.high:{form}})"
