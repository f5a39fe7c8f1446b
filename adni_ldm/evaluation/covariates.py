"""Conditions beside the class, such as age: do samples show what was asked for, and is the effect of the
class that at equal conditions?

Both need samples whose metadata.csv says what was asked for, and real data with the same columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from adni_ldm.data.conditions import condition_rows, describe_conditions
from adni_ldm.data.splits import DataError
from adni_ldm.evaluation.classifier import STEPS, fit_network, outputs_of
from adni_ldm.evaluation.estimates import Estimate, Resamples, estimate, unknown
from adni_ldm.evaluation.image_sets import ImageSet, too_few

ADJUSTED = ("ventricle_mm2", "brain_mm2")  # measures of `anatomy.MEASURES`
CALIPER = 0.25  # standard deviations by which a number of comparable slices may differ


def describe_real(real: ImageSet) -> dict[str, dict]:
    """`describe_conditions` of a set's conditions, without those that cannot be one in these data."""
    described = {}
    for name, values in real.conditions.items():
        try:
            described |= describe_conditions({name: values.tolist()})
        except DataError:  # the same everywhere, or free text
            continue
    return described


def rows_of(images: ImageSet, about: Mapping[str, Mapping]) -> np.ndarray:
    """Conditions (N, K): numbers, indices of categories, and NaN where missing or not asked for."""
    return condition_rows(about, images.conditions, len(images)).double().numpy()


def comparable(one: np.ndarray, other: np.ndarray, about: Mapping[str, Mapping]) -> np.ndarray:
    """Which rows of (N, K) and (M, K) have the same conditions, bool (N, M).

    Categories are the same, numbers within CALIPER standard deviations; a missing value is the same as any.
    """
    same = np.ones((len(one), len(other)), dtype=bool)
    for column, description in enumerate(about.values()):
        apart = np.abs(one[:, column, None] - other[None, :, column])  # NaN where either is missing
        same &= ~(apart > (0 if "categories" in description else CALIPER * description["std"]))
    return same


# ---- What was asked for against what is seen ---------------------------------------------------------------


def condition_faithfulness(
    about: Mapping[str, Mapping],
    train: ImageSet,
    samples: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = STEPS,
    draws: int = 1000,
) -> dict[str, dict[str, Estimate]]:
    """How far the conditions that a network reads off the samples are those that were asked for.

    The network is `build_classifier`, trained on real slices of `train` to predict the conditions. Returns
    `asked_against_seen` for each condition. No network is trained where `too_few` samples or subjects.
    """
    if problem := too_few(samples, held_out):
        return {name: {"slope_ratio": unknown(problem)} for name in about}
    predictor = train_predictor(about, train, seed=seed, device=device, steps=steps)
    sets = [
        (
            rows_of(one, about),
            predictions(predictor, one, about),
            Resamples.draw(one.subjects, draws, [seed, k]),
        )
        for k, one in ((1, samples), (0, held_out))
    ]
    results = {}
    for column, (name, description) in enumerate(about.items()):
        pairs = ((true[:, column], seen[:, column], resamples) for true, seen, resamples in sets)
        results[name] = asked_against_seen(*pairs, categories=len(description.get("categories", ())))
    return results


def asked_against_seen(
    samples: tuple[np.ndarray, np.ndarray, Resamples],
    real: tuple[np.ndarray, np.ndarray, Resamples],
    categories: int = 0,
) -> dict[str, Estimate]:
    """What a predictor says of one condition, on samples and, as reference, on held-out slices.

    Args:
        samples, real: the condition that was asked for, or is true (N,), NaN where missing; what is predicted
            (N,); and bootstrap samples.
        categories: how many there are; 0 of a number.

    Returns:
        of a number the slope of the predicted value on the one asked for, their correlation (Pearson's r),
        and the mean absolute error; of a category the balanced accuracy. And "slope_ratio", the slope in
        samples ÷ that in held-out slices, which a predictor that regresses to the mean does not change.
        No values where fewer than two different ones were asked for, or are known.
    """
    known = [np.unique(true[np.isfinite(true)]) for true, _, _ in (samples, real)]  # different values
    for values, fewer in zip(known, ("asked for in these samples", "known of the held-out slices")):
        if len(values) < 2:
            reason = f"the same was {fewer} everywhere" if len(values) else f"it was not {fewer}"
            return {"slope_ratio": unknown(reason)}
    with np.errstate(divide="ignore", invalid="ignore"):
        if categories:
            found = [_balanced_accuracy(*one, np.intersect1d(*known)) for one in (samples, real)]
            return {"accuracy": estimate(found[0]).with_reference(found[1][0])}
        found, expected = (_line(*one) for one in (samples, real))
    results = {name: estimate(values).with_reference(expected[name][0]) for name, values in found.items()}
    return results | {"slope_ratio": estimate(found["slope"] / expected["slope"]).with_reference(1.0)}


def _line(true: np.ndarray, seen: np.ndarray, resamples: Resamples) -> dict[str, np.ndarray]:
    """Draws (B + 1,) of the slope of seen on true, their correlation, and the mean absolute error."""
    known = np.isfinite(true)
    x, y = (np.where(known, one - one[known].mean(), 0) for one in (true, seen))
    count = resamples.sum(known)
    mean_x, mean_y, xx, yy, xy = (resamples.sum(one) / count for one in (x, y, x * x, y * y, x * y))
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    return {
        "slope": covariance / variance_x,
        "correlation": covariance / np.sqrt(variance_x * variance_y),
        "error": resamples.sum(np.where(known, np.abs(seen - true), 0)) / count,
    }


def _balanced_accuracy(
    true: np.ndarray, seen: np.ndarray, resamples: Resamples, among: np.ndarray
) -> np.ndarray:
    """Draws (B + 1,) of the mean over the categories `among` of the share that is recognized."""
    shares = [
        resamples.sum((true == index) & (seen == index)) / resamples.sum(true == index) for index in among
    ]
    return np.mean(shares, axis=0)


def train_predictor(
    about: Mapping[str, Mapping],
    train: ImageSet,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = STEPS,
) -> nn.Module:
    """A network from slices to conditions, for `predictions`: squared error of standardized numbers, and
    cross-entropy of categories; missing values have no loss."""
    rows = torch.from_numpy(rows_of(train, about)).float().to(device)  # (N, K)

    def loss_of(outputs: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        loss = outputs.sum() * 0  # where nothing is known
        for column, (output, description) in enumerate(_by_condition(outputs, about)):
            true = rows[drawn.to(device), column]
            known = true.isfinite()
            if not known.any():
                continue
            if "categories" in description:
                loss = loss + F.cross_entropy(output[known], true[known].long())
            else:
                standardized = (true[known] - description["mean"]) / description["std"]
                loss = loss + F.mse_loss(output[known, 0], standardized)
        return loss

    outputs = sum(len(one.get("categories", [""])) for one in about.values())
    description = "Training a predictor of conditions on real slices"
    options = {"device": device, "steps": steps, "description": description}
    return fit_network(train, outputs, loss_of, torch.ones(len(train)), seed=seed, **options)


def predictions(model: nn.Module, images: ImageSet, about: Mapping[str, Mapping]) -> np.ndarray:
    """Conditions (N, K) that `train_predictor`'s network reads off slices, as `rows_of` numbers them."""
    found = [
        output.argmax(1).double()
        if "categories" in description
        else output[:, 0].double() * description["std"] + description["mean"]
        for output, description in _by_condition(outputs_of(model, images), about)
    ]
    return torch.stack(found, dim=1).numpy()


def _by_condition(outputs: torch.Tensor, about: Mapping[str, Mapping]) -> list[tuple[torch.Tensor, Mapping]]:
    """The outputs (B, C) of each condition, C = 1 of a number, with its description."""
    sizes = [len(one.get("categories", [""])) for one in about.values()]
    return list(zip(outputs.split(sizes, dim=1), about.values(), strict=True))


# ---- The effect of the class at equal conditions -----------------------------------------------------------


def adjusted_effects(
    about: Mapping[str, Mapping],
    real: ImageSet,
    real_values: Mapping[str, np.ndarray],
    samples: ImageSet,
    sample_values: Mapping[str, np.ndarray],
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, dict[str, Estimate]]:
    """First class less last, of each of ADJUSTED, in real slices and in samples, as it is and adjusted.

    Adjusted is the coefficient of the class in a linear model (analysis of covariance) of the measure on
    class, numbers with their squares, and categories; slices and samples with a missing value are left out.
    "ratio" is the adjusted difference in samples ÷ that in real slices.
    """
    results = {}
    for measure in ADJUSTED:
        found, gaps = {}, []
        for which, images, values in (
            ("real", real, real_values[measure]),
            ("synthetic", samples, sample_values[measure]),
        ):
            ends = (images.labels == 0) | (images.labels == len(images.class_names) - 1)
            known = ends & np.isfinite(values) & np.isfinite(rows_of(images, about)).all(axis=1)
            some, values = images.take(known), values[known]
            if len(np.unique(some.labels)) < 2 or len(np.unique(some.subjects)) < 2 * len(about) + 4:
                gaps.append(f"too few {which} slices with known conditions")
                continue
            resamples = Resamples.draw(some.subjects, draws, [seed, which == "synthetic"])
            patients = (some.labels == 0).astype(float)
            constant = np.ones(len(some))
            covariates = np.column_stack([_covariate_columns(some, about), constant])
            left = patients - covariates @ np.linalg.lstsq(covariates, patients, rcond=None)[0]
            if left.var() < 1e-6 * patients.var():
                gaps.append(f"class and conditions cannot be told apart in the {which} slices")
                continue
            alone = np.column_stack([patients, constant])
            design = np.column_stack([patients, covariates])
            found[f"{which}_plain"] = _coefficient(alone, values, resamples)
            found[f"{which}_adjusted"] = _coefficient(design, values, resamples)
        if gaps:
            results[measure] = {"adjusted_ratio": unknown("; ".join(gaps))}
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = found["synthetic_adjusted"] / found["real_adjusted"]
        results[measure] = {name: estimate(values) for name, values in found.items()}
        results[measure]["adjusted_ratio"] = estimate(ratio).with_reference(1.0)
    return results


def _covariate_columns(images: ImageSet, about: Mapping[str, Mapping]) -> np.ndarray:
    """Columns (N, P) of a linear model: z and z² of a number, an indicator of each category but one."""
    columns = [np.zeros((len(images), 0))]
    for values, description in zip(rows_of(images, about).T, about.values(), strict=True):
        if "categories" in description:
            columns.append(values[:, None] == np.arange(1, len(description["categories"])))
        else:
            z = (values - description["mean"]) / description["std"]
            columns.append(np.column_stack([z, z**2]))
    return np.column_stack(columns).astype(float)


def _coefficient(design: np.ndarray, values: np.ndarray, resamples: Resamples) -> np.ndarray:
    """Draws (B + 1,) of the first coefficient of values (N,) on design (N, P), by least squares. Columns that
    do not vary in a bootstrap sample have none (the pseudoinverse)."""
    products = np.einsum("np,nq->npq", design, design).reshape(len(design), -1)
    gram = resamples.sum(products).reshape(-1, design.shape[1], design.shape[1])
    moment = resamples.sum(design * values[:, None])
    return np.einsum("bp,bp->b", np.linalg.pinv(gram, hermitian=True)[:, 0], moment)


def subject_conditions(
    images: ImageSet, subjects: Sequence[str], labels: Sequence[int], about: Mapping[str, Mapping]
) -> np.ndarray:
    """Conditions (S, K) of subjects with a diagnosis: the mean over the slices, such as of ages at visits.

    NaN where a subject's slices are more than two calipers apart, as in their position, or of two categories.
    """
    rows = rows_of(images, about)
    widest = np.array([0 if "categories" in one else 2 * CALIPER * one["std"] for one in about.values()])
    found = np.full((len(subjects), len(about)), np.nan)
    for index, (subject, label) in enumerate(zip(subjects, labels, strict=True)):
        own = rows[(images.subjects == subject) & (images.labels == label)]
        near = np.ptp(own, axis=0) <= widest  # False where one is missing
        found[index, near] = own[:, near].mean(axis=0)
    return found
