"""The head of the report: a line for each question, in plain words."""

from __future__ import annotations

from collections.abc import Mapping

from adni_ldm.evaluation.estimates import Estimate

NEAR_FLOOR = 0.8  # of the floor: precision and recall from which samples match real slices
FAITHFUL = 0.03  # below the classifier's own accuracy
WIDEST = 0.3  # interval of a share, above which it says nothing
USEFUL = 0.95  # of the AUC reached by training on real slices
MEMBERSHIP = 0.6  # AUC that the membership test must surely exceed before the model is said to remember
EFFECT = (0.8, 1.25)  # of the disease's effect in real slices


def verdicts(metrics: Mapping[str, Mapping]) -> dict[str, dict]:
    """{question: {"good": True, False or None where it cannot be told, "text": …}} of the report's figures.

    Args:
        metrics: the sections fidelity, usefulness, faithfulness, anatomy and privacy, of Estimates.
    """
    return {
        "fidelity": _fidelity(metrics["fidelity"]["all"]),
        "usefulness": _usefulness(metrics["usefulness"]),
        "faithfulness": _faithfulness(
            metrics["faithfulness"]["agreement"]["all"], metrics["anatomy"]["ventricle_ratio"]
        ),
        "privacy": _privacy(metrics["privacy"]),
    }


def _fidelity(figures: Mapping[str, Estimate]) -> dict:
    kid, precision, recall = (figures[name] for name in ("kid", "precision", "recall"))
    if gap := _gap(kid, precision, recall):
        return gap
    near = [figure.value >= NEAR_FLOOR * figure.floor for figure in (precision, recall)]
    said = (
        f"KID {_with_interval(kid, '.3f')} where other real people reach {kid.floor:.3f}. "
        f"{precision.value:.0%} of the samples lie among real slices (real ones: {precision.floor:.0%}), and "
        f"{recall.value:.0%} of the real slices lie among samples (real ones: {recall.floor:.0%}). "
    )
    if all(near):
        said += "In these features a sample passes for a slice of another person."
    elif near[0]:
        said += "The samples look real, and leave out part of what real slices show."
    else:
        said += "Part of the samples look like no real slice: do not take them for real ones."
    return {
        "good": all(near),
        "text": said + " Features of a network see what it was trained to see, no more.",
    }


def _usefulness(figures: Mapping) -> dict:
    real, synthetic, ratio = figures["real"]["auc"], figures["synthetic"]["auc"], figures["auc_ratio"]
    if gap := _gap(real, synthetic, ratio, floors=False):
        return gap
    good = ratio.value >= USEFUL
    said = (
        f"Trained on samples alone, a classifier tells people it has not seen apart with AUC "
        f"{_with_interval(synthetic, '.2f')}; trained on real slices with {_with_interval(real, '.2f')}. "
    )
    if real.low is not None and real.low <= 0.5:
        return {"good": None, "text": said + "Real slices teach it nothing for certain, so nothing follows."}
    said += (
        "For training a classifier they stand in for the real slices."
        if good
        else "They lose part of what sets the classes apart."
    )
    return {"good": good, "text": said + " It does not follow that they add to real slices."}


def _faithfulness(agreement: Estimate, anatomy: Mapping[str, Estimate]) -> dict:
    if gap := _gap(agreement):
        return gap
    if agreement.high - agreement.low > WIDEST:
        return {"good": None, "text": "Cannot be told: too few samples to say how many show their class."}
    shown = agreement.value >= agreement.floor - FAITHFUL
    said = (
        f"An independent classifier takes {_with_interval(agreement, '.0%')} of the samples for the class "
        f"asked for, and is right about {agreement.floor:.0%} of real slices it has not seen. "
    )
    ratio = anatomy["effect_ratio"]
    if ratio.value is None:
        said += f"Whether the anatomy changes by as much cannot be told: {ratio.note}."
        told = anatomy["effect_synthetic"].value is not None  # else it is the samples that say nothing
        return {"good": (shown if told or not shown else None), "text": said}
    as_strong = EFFECT[0] <= ratio.value <= EFFECT[1]
    said += f"The effect on the ventricles is {_with_interval(ratio, '.2f')} times that in real slices: "
    said += "as strong. " if as_strong else ("weaker. " if ratio.value < EFFECT[0] else "exaggerated. ")
    said += (
        "The classes mean in the samples what they mean in the scans."
        if shown and as_strong
        else "Do not read the disease's effect off these samples."
    )
    return {"good": shown and as_strong, "text": said}


def _privacy(figures: Mapping[str, Estimate]) -> dict:
    copies, membership = figures["copies"], figures.get("membership_auc")
    if gap := _gap(copies):
        return gap
    good = copies.low <= copies.floor
    said = (
        f"{_with_interval(copies, '.1%')} of the samples lie nearer to a training slice than the rule "
        f"allows; of slices of people who were not trained on, {copies.floor:.1%} do. "
    )
    if membership is not None and membership.value is not None:
        hidden = membership.low <= MEMBERSHIP
        auc = _with_interval(membership, ".2f")
        said += f"The model's loss tells training subjects from others with AUC {auc}"
        if membership.low <= 0.5:
            said += ", no better than chance. "
        else:
            said += ": weakly, yet not by chance. " if hidden else ": it remembers them. "
        good = good and hidden
    else:
        said += "Whether the model's loss gives its training subjects away was not tested (--model). "
    said += (
        "No more copies than other people's slices would be taken for: no proof that none can be drawn."
        if good
        else "Look at the nearest pairs, and do not publish these samples or this model."
    )
    return {"good": good, "text": said}


def _gap(*figures: Estimate, floors: bool = True) -> dict | None:
    """The verdict where a figure, or its floor where one is asked for, is missing."""
    for figure in figures:
        if figure.value is None or (floors and figure.floor is None):
            reason = figure.note or "there are no real slices to compare with"
            return {"good": None, "text": f"Cannot be told: {reason}."}
    return None


def _with_interval(figure: Estimate, form: str) -> str:
    said = format(figure.value, form)
    return said if figure.low is None else f"{said} ({figure.low:{form}} to {figure.high:{form}})"
