"""Verdicts: the answer to each question of the report, from its estimates and their intervals."""

from __future__ import annotations

from collections.abc import Mapping

from adni_ldm.evaluation.estimates import Estimate

NEAR_REFERENCE = 0.8  # share of the reference that precision and recall must reach
ACCURACY_MARGIN = 0.03  # by which class-conditioning accuracy may be below the reference
WIDEST = 0.3  # interval of a proportion, above which it is not informative
AUC_RATIO = 0.95  # AUC trained on samples ÷ AUC trained on real slices
MEMBERSHIP = 0.6  # AUC that the interval of the membership test must lie above to count as memorization
EFFECT = (0.8, 1.25)  # disease effect in samples ÷ in real slices


def verdicts(metrics: Mapping[str, Mapping]) -> dict[str, dict]:
    """{question: {"good": True, False or None if inconclusive, "text": …}} for each of QUESTIONS.

    Args:
        metrics: the sections fidelity, tstr, conditioning, anatomy and privacy, of Estimates.
    """
    accuracy = metrics["conditioning"]["class_conditioning_accuracy"]["all"]
    return {
        "fidelity": _fidelity(metrics["fidelity"]["all"]),
        "usefulness": _tstr(metrics["tstr"]),
        "faithfulness": _conditioning(accuracy, metrics["anatomy"]["ventricle_ratio"]),
        "privacy": _privacy(metrics["privacy"]),
    }


def _fidelity(estimates: Mapping[str, Estimate]) -> dict:
    kid, precision, recall = (estimates[name] for name in ("kid", "precision", "recall"))
    if missing := _missing(kid, precision, recall):
        return missing
    near = [one.value >= NEAR_REFERENCE * one.reference for one in (precision, recall)]
    text = (
        f"KID is {_with_interval(kid, '.3f')}, its reference {kid.reference:.3f}. Precision, the share of "
        f"samples within the distribution of real slices, is {precision.value:.0%} (reference "
        f"{precision.reference:.0%}). Recall, the share of real slices within the distribution of samples, "
        f"is {recall.value:.0%} (reference {recall.reference:.0%}). "
    )
    if all(near):
        text += (
            "In these features samples are about as close to the real slices as slices of other subjects are."
        )
    elif near[0]:
        text += "The samples are realistic, but cover only part of the real distribution."
    else:
        text += "Some samples resemble no real slice: do not use them in place of real slices."
    return {"good": all(near), "text": text + " Differences outside these features are not measured."}


def _tstr(estimates: Mapping) -> dict:
    real, synthetic, ratio = estimates["real"]["auc"], estimates["synthetic"]["auc"], estimates["auc_ratio"]
    if missing := _missing(real, synthetic, ratio, references=False):
        return missing
    text = (
        f"On held-out subjects, a classifier trained on samples alone reaches an AUC of "
        f"{_with_interval(synthetic, '.2f')}; trained on real slices, {_with_interval(real, '.2f')}. "
    )
    if real.low is not None and real.low <= 0.5:
        text += "Trained on real slices it is not reliably above chance, so no conclusion can be drawn."
        return {"good": None, "text": text}
    good = ratio.value >= AUC_RATIO
    text += (
        "The samples can replace the real slices in training this classifier."
        if good
        else "The samples lose part of the difference between the classes."
    )
    return {"good": good, "text": text + " Whether they improve training beside real slices is not tested."}


def _conditioning(accuracy: Estimate, anatomy: Mapping[str, Estimate]) -> dict:
    if missing := _missing(accuracy):
        return missing
    if accuracy.high - accuracy.low > WIDEST:
        return {"good": None, "text": "Too few samples to estimate the class-conditioning accuracy."}
    accurate = accuracy.value >= accuracy.reference - ACCURACY_MARGIN
    text = (
        f"Class-conditioning accuracy, the share of samples that an independent classifier assigns to their "
        f"class, is {_with_interval(accuracy, '.0%')}; on held-out real slices the classifier is correct in "
        f"{accuracy.reference:.0%}. "
    )
    ratio = anatomy["effect_ratio"]
    if ratio.value is None:
        text += (
            f"Whether the disease effect on the ventricles is preserved cannot be determined: {ratio.note}."
        )
        by_real = (
            anatomy["effect_synthetic"].value is not None
        )  # the real slices are inconclusive, not samples
        return {"good": (accurate if by_real or not accurate else None), "text": text}
    preserved = EFFECT[0] <= ratio.value <= EFFECT[1]
    strength = "preserved" if preserved else ("too weak" if ratio.value < EFFECT[0] else "exaggerated")
    text += (
        f"The disease effect on the ventricles is {strength}: {_with_interval(ratio, '.2f')} times that in "
        "real slices. "
    )
    text += (
        "The samples reproduce the difference between the classes."
        if accurate and preserved
        else "Do not estimate effects of the disease from these samples."
    )
    return {"good": accurate and preserved, "text": text}


def _privacy(estimates: Mapping[str, Estimate]) -> dict:
    copies, membership = estimates["copies"], estimates.get("membership_auc")
    if missing := _missing(copies):
        return missing
    good = copies.low <= copies.reference
    text = (
        f"{_with_interval(copies, '.1%')} of the samples are classified as copies of a training slice; so "
        f"are {copies.reference:.1%} of the real slices of held-out subjects. "
    )
    if membership is not None and membership.value is not None:
        hidden = membership.low <= MEMBERSHIP
        text += (
            "Membership inference from the model's loss reaches an AUC of "
            f"{_with_interval(membership, '.2f')}"
        )
        if membership.low <= 0.5:
            text += ", not distinguishable from chance. "
        else:
            text += ": weak, but above chance. " if hidden else ": training subjects can be identified. "
        good = good and hidden
    else:
        text += "Membership inference from the model's loss was not tested (give --model). "
    text += (
        "There are no more copies than false positives explain. This does not prove that the model cannot "
        "reproduce a training image."
        if good
        else "Inspect the nearest pairs, and do not publish these samples or this model."
    )
    return {"good": good, "text": text}


def _missing(*estimates: Estimate, references: bool = True) -> dict | None:
    """The verdict where an estimate, or its reference where one is required, is missing; else None."""
    for one in estimates:
        if one.value is None or (references and one.reference is None):
            reason = one.note or "there are no real slices to compare with"
            return {"good": None, "text": f"Cannot be determined: {reason}."}
    return None


def _with_interval(estimate: Estimate, form: str) -> str:
    text = format(estimate.value, form)
    if estimate.low is None:
        return text
    return f"{text} (95 % CI {estimate.low:{form}} to {estimate.high:{form}})"
