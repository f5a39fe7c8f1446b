"""How near samples come to the real distribution, and how varied they are: FID, KID, precision, recall,
density, coverage and MS-SSIM.

Samples are compared with real slices of subjects that the model never saw. The floor is what the same number
of slices of other real subjects, those of the training set, reach in the samples' place: a model that did no
more than copy its training set would reach just that, and fall through on privacy.

Real slices come in subjects, and slices of one subject resemble each other. So pairs of slices of one
subject are left out of KID's sums and of the neighbours that span a manifold, and intervals draw subjects,
not slices. Where every slice is a subject of its own, as among samples, all is as in the papers.

KID is the figure to read first: it is unbiased, so the number of slices changes its interval alone. FID is
biased upwards, the more so the fewer the slices and the subjects; with fewer slices than features the
covariances are singular, and FID can be computed but means little. Its floor has the same number of slices,
of fewer subjects, so samples can come out below it.

Memory grows with the square of the number of slices: 10,000 against 10,000 take about 3 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from scipy.spatial.distance import cdist
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from adni_ldm.evaluation.estimates import FEWEST_SLICES, FEWEST_SUBJECTS, LEVEL, Estimate, bootstrap, unknown
from adni_ldm.evaluation.image_sets import ImageSet

METRICS = ("kid", "fid", "precision", "recall", "density", "coverage", "ms_ssim")
FID_DRAWS = 100  # for FID's interval; a draw costs a singular value decomposition

_BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the five scales (Wang et al. 2003)


def fidelity(
    held_out: ImageSet,
    train: ImageSet,
    samples: ImageSet,
    features: Sequence[np.ndarray],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Estimate]]:
    """Every one of METRICS for "all" and for each class, beside its floor.

    In "all" every class has the same share on either side, so that it is not the mix of classes that differs.

    Args:
        held_out: slices of subjects that the model was not trained on: what samples are compared with.
        train: slices of other real subjects, which give the floor. Where they are fewer than the samples, as
            many samples are left out.
        features: (N, D) of `held_out`, `train` and `samples`, from one extractor.
        draws: of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    sets = (held_out, train, samples)
    classes = range(len(held_out.class_names))
    rows = [[rng.permutation(np.flatnonzero(one.labels == k)) for k in classes] for one in sets]
    results = {}
    for name, labels in {"all": classes, **{held_out.class_names[k]: [k] for k in classes}}.items():
        if problem := _too_few(*sets, labels):
            results[name] = {metric: unknown(problem) for metric in METRICS}
            continue
        counts = [min(len(by_class[k]) for k in labels) for by_class in rows]  # slices of each class
        counts[1:] = [min(counts[1:])] * 2
        chosen = [np.concatenate([by_class[k][:n] for k in labels]) for by_class, n in zip(rows, counts)]
        real, others, drawn = (one.take(row) for one, row in zip(sets, chosen))
        x, z, y = (feature[row].astype(np.float64) for feature, row in zip(features, chosen))
        floors = compare(x, z, real.subjects, others.subjects, draws=0)
        floors["ms_ssim"] = structural_similarity(others, draws=0)
        figures = compare(x, y, real.subjects, drawn.subjects, draws=draws)
        figures["ms_ssim"] = structural_similarity(drawn, draws=draws)
        results[name] = {metric: figures[metric].with_floor(floors[metric].value) for metric in METRICS}
    return results


def _too_few(held_out: ImageSet, train: ImageSet, samples: ImageSet, labels: Sequence[int]) -> str:
    """What there is too little of; "" where there is enough."""
    for label in labels:
        for what, one in (("samples", samples), ("held-out slices", held_out), ("training slices", train)):
            subjects = one.subjects[one.labels == label]
            if len(subjects) < FEWEST_SLICES or len(np.unique(subjects)) < FEWEST_SUBJECTS:
                return (
                    f"{len(subjects)} {what} of {one.class_names[label]}, of {len(np.unique(subjects))} "
                    f"subjects: {FEWEST_SLICES} of {FEWEST_SUBJECTS} are needed"
                )
    return ""


def compare(
    real: np.ndarray,
    other: np.ndarray,
    real_subjects: np.ndarray,
    other_subjects: np.ndarray,
    *,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """All but MS-SSIM, of features (N, D) and (M, D) and their rows' subjects; no intervals for draws=0."""
    return {
        "kid": kernel_distance(real, other, real_subjects, other_subjects, draws=draws),
        "fid": _frechet_estimate(real, other, real_subjects, other_subjects, min(draws, FID_DRAWS)),
        **manifold_figures(real, other, real_subjects, other_subjects, draws=draws),
    }


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """FID of features (N, D) and (M, D): ‖μx − μy‖² + tr(Σx + Σy − 2 (Σx Σy)^½) (Heusel et al. 2017, eq. 6).

    With Σ = AᵀA the trace of the root is the sum of the singular values of Ax Ayᵀ, which needs no root of a
    matrix and holds for singular Σ.
    """
    roots = [_root(features) for features in (x, y)]
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    spread = sum((root**2).sum() for root in roots)
    return float(max(0.0, ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * overlap))


def _root(features: np.ndarray) -> np.ndarray:
    """A (≤ D, D) with AᵀA the covariance of features (N, D)."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred


def _frechet_estimate(x, y, x_subjects, y_subjects, draws: int) -> Estimate:
    value = frechet_distance(x, y)
    low, high = bootstrap(lambda i, j: frechet_distance(x[i], y[j]), x_subjects, y_subjects, count=draws)
    half = (high - low) / 2  # laid about the value: rows drawn twice push the FID of every draw up
    few, width = min(len(x), len(y)), x.shape[1]
    note = (
        f"{few} slices for {width} features: the covariances are singular, read KID" if few <= width else ""
    )
    return Estimate(value, np.maximum(0, value - half), value + half, note=note)


def kernel_distance(
    x: np.ndarray,
    y: np.ndarray,
    x_subjects: np.ndarray,
    y_subjects: np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """KID: the unbiased estimate of MMD² with the kernel (x·y / D + 1)³ (Binkowski et al. 2018, section 4),
    of features (N, D) and (M, D). Below zero by chance where the two are alike.

    Pairs of rows of one subject are left out, as the usual estimate leaves out a row with itself; a draw of
    the bootstrap leaves out the same pairs, so it has no bias either.
    """
    x_sums, y_sums = _subject_sums(x_subjects), _subject_sums(y_subjects)
    x_size, y_size = x_sums.sum(1), y_sums.sum(1)  # slices of each subject
    across = x_sums @ _cubic(x, y) @ y_sums.T  # summed over the pairs of slices of two subjects
    within_x, within_y = x_sums @ _cubic(x, x) @ x_sums.T, y_sums @ _cubic(y, y) @ y_sums.T
    np.fill_diagonal(within_x, 0)
    np.fill_diagonal(within_y, 0)

    def squared_mmd(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(B,), where subjects are taken u (B, subjects of x) and v (B, subjects of y) times."""
        pairs_x = (u @ x_size) ** 2 - (u**2) @ (x_size**2)
        pairs_y = (v @ y_size) ** 2 - (v**2) @ (y_size**2)
        return (
            ((u @ within_x) * u).sum(1) / pairs_x
            + ((v @ within_y) * v).sum(1) / pairs_y
            - 2 * ((u @ across) * v).sum(1) / ((u @ x_size) * (v @ y_size))
        )

    value = squared_mmd(np.ones((1, len(x_size))), np.ones((1, len(y_size))))[0]
    if not draws:
        return Estimate(value)
    rng = np.random.default_rng(seed)
    u, v = (rng.multinomial(n, np.full(n, 1 / n), draws).astype(float) for n in (len(x_size), len(y_size)))
    with np.errstate(invalid="ignore"):  # a draw of one subject over and over has no pairs
        values = squared_mmd(u, v)
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, low, high)


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _subject_sums(subjects: np.ndarray) -> sparse.csr_array:
    """(subjects, rows) of ones and zeros, which sums rows by subject."""
    names, inverse = np.unique(subjects, return_inverse=True)
    ones = np.ones(len(inverse))
    return sparse.csr_array((ones, (inverse, np.arange(len(inverse)))), shape=(len(names), len(inverse)))


def manifold_figures(
    real: np.ndarray,
    other: np.ndarray,
    real_subjects: np.ndarray,
    other_subjects: np.ndarray,
    *,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2, k = 3), density and coverage (Naeem et al.
    2020, eq. 3 and 4, k = 5), of features (N, D) and (M, D).

    A slice spans a ball that reaches to its k-th nearest slice of another subject. The intervals draw the
    slices that are counted, by subject, and leave the balls as they are.
    """
    distances = cdist(real, other)  # (N, M)
    real_3, real_5 = (radii(real, real_subjects, k)[:, None] for k in (3, 5))
    scores = {
        "precision": ((distances <= real_3).any(0), other_subjects),
        "recall": ((distances <= radii(other, other_subjects, 3)).any(1), real_subjects),
        "density": ((distances <= real_5).sum(0) / 5, other_subjects),
        "coverage": ((distances <= real_5).any(1), real_subjects),
    }
    return {name: _mean(values, subjects, draws) for name, (values, subjects) in scores.items()}


def radii(features: np.ndarray, subjects: np.ndarray, k: int) -> np.ndarray:
    """Distance (N,) of each row of features (N, D) to its k-th nearest row of another subject."""
    distances = cdist(features, features)
    distances[subjects[:, None] == subjects] = np.inf
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def structural_similarity(images: ImageSet, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean MS-SSIM (Wang et al. 2003) of pairs of one class and of two subjects: the less, the more varied.

    Every slice is in one pair at most. Pictures under 176 pixels are compared at fewer scales, at 64 pixels
    at three of the five, whose weights are scaled up to a sum of one.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for label in np.unique(images.labels):
        rows = rng.permutation(np.flatnonzero(images.labels == label))
        pairs.append(rows[: len(rows) // 2 * 2].reshape(-1, 2))
    first, second = np.concatenate(pairs).T
    apart = images.subjects[first] != images.subjects[second]
    first, second = first[apart], second[apart]
    if not len(first):
        return unknown("no two slices of a class are of different subjects")

    scales = max(n for n in range(1, 6) if images.images.shape[-1] // max(1, n - 1) ** 2 > 10)
    betas = tuple(beta / sum(_BETAS[:scales]) for beta in _BETAS[:scales])
    pixels = images.images.float() / 255  # black is 0: dark ground must not count as bright tissue does
    values = [
        multiscale_structural_similarity_index_measure(
            pixels[first[batch]], pixels[second[batch]], data_range=1.0, betas=betas, reduction=None
        )
        for batch in np.array_split(np.arange(len(first)), len(first) // 64 + 1)
    ]
    return _mean(torch.cat(values).numpy(), np.arange(len(first)), draws)


def _mean(values: np.ndarray, subjects: np.ndarray, draws: int) -> Estimate:
    interval = bootstrap(lambda rows: values[rows].mean(), subjects, count=draws)
    return Estimate(values.mean(), *interval)
