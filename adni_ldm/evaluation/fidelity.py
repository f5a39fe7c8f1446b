"""Fidelity and diversity of samples: FID, KID, precision, recall, density, coverage and MS-SSIM.

Samples are compared with real slices of held-out subjects. The reference is the value of equally many real
slices of the training subjects in the samples' place. A model that only copied its training set would reach
the reference; the section on memorization detects this.

Slices of one subject resemble each other. Pairs of slices of one subject are therefore excluded from KID and
from the neighbors that define a manifold, and intervals resample subjects instead of slices. Where every
slice has a subject of its own, as among samples, the metrics equal those of the papers.

KID should be read first: it is unbiased, so the number of slices changes only its interval. Its scale depends
on the features. It is therefore also given as a share of the variance of real slices in the space of its
kernel, which is to KID what a squared standardized difference is to a squared difference of means. FID is
biased upwards, the more the fewer slices and subjects there are; with fewer slices than features the
covariances are singular and FID means little. Its reference uses as many slices of fewer subjects, so
samples can be below it.

Memory grows with the square of the number of slices: 10,000 against 10,000 take about 3 GB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from scipy.spatial.distance import cdist
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from adni_ldm.evaluation.estimates import (
    FEWEST_SLICES,
    FEWEST_SUBJECTS,
    Estimate,
    Resamples,
    estimate,
    unknown,
)
from adni_ldm.evaluation.image_sets import ImageSet

MANIFOLD = ("precision", "recall", "density", "coverage")
RATIOS = tuple(f"{name}_ratio" for name in MANIFOLD)  # each relative to its reference
METRICS = ("kid", "kid_share", "fid", *MANIFOLD, *RATIOS, "ms_ssim")
FID_DRAWS = 100  # bootstrap samples of FID, each of which costs a singular value decomposition

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
    """Each of METRICS with its reference, for "all" and for each class.

    In "all", class frequencies are the same in both sets, so that a difference is not due to the class mix.

    Args:
        held_out: real slices of subjects that the model was not trained on.
        train: real slices of the training subjects, which give the reference. Samples and training slices are
            reduced to the same number.
        features: (N, D) of `held_out`, `train` and `samples`, from one extractor.
        draws: number of bootstrap samples.
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
        real, others, synthetic = (one.take(row) for one, row in zip(sets, chosen))
        x, z, y = (feature[row].astype(np.float64) for feature, row in zip(features, chosen))
        subjects = (real.subjects, others.subjects, synthetic.subjects)
        results[name] = compare_features((x, z, y), subjects, draws=draws)
        results[name]["ms_ssim"] = structural_similarity(synthetic, draws=draws).with_reference(
            structural_similarity(others, draws=0).value
        )
    return results


def _too_few(held_out: ImageSet, train: ImageSet, samples: ImageSet, labels: Sequence[int]) -> str:
    """What there is too little of; "" where there is enough."""
    for label in labels:
        for what, one in (("samples", samples), ("held-out slices", held_out), ("training slices", train)):
            subjects = one.subjects[one.labels == label]
            if len(subjects) < FEWEST_SLICES or len(np.unique(subjects)) < FEWEST_SUBJECTS:
                return (
                    f"{len(subjects)} {what} of {one.class_names[label]}, of {len(np.unique(subjects))} "
                    f"subjects: at least {FEWEST_SLICES} of {FEWEST_SUBJECTS} subjects are needed"
                )
    return ""


def compare_features(
    features: Sequence[np.ndarray], subjects: Sequence[np.ndarray], *, draws: int = 1000, fid: bool = True
) -> dict[str, Estimate]:
    """All metrics but MS-SSIM, with their references.

    Args:
        features: (N, D) of held-out real slices, (M, D) of training slices, (M, D) of samples.
        subjects: those of each row. The ratios' intervals resample the subjects of all three sets.
        fid: compute FID, which takes longest.
    """
    for name, one in zip(("held-out slices", "training slices", "samples"), features, strict=True):
        if not np.isfinite(one).all():
            raise ValueError(f"features of {name} are not finite: the network that computes them overflows")
    real, train, samples = zip(features, subjects, strict=True)
    sets, reference_sets = (
        (real[0], other[0], real[1], other[1]) for other in (samples, train)
    )  # as the metrics take them
    kid, reference = kernel_distance(*sets, draws=draws), kernel_distance(*reference_sets, draws=0)
    variance = kernel_variance(*real)
    share = unknown("the held-out slices are all alike")
    if variance > 0:
        share = kid.scaled(1 / variance).with_reference(reference.value / variance)
    results = {"kid": kid.with_reference(reference.value), "kid_share": share}
    if fid:
        few_draws = min(draws, FID_DRAWS)
        reference = frechet_distance(features[0], features[1])
        results["fid"] = _frechet_estimate(*sets, few_draws).with_reference(reference)
    real_radii = _real_radii(*real)
    values = _manifold_draws(*sets, real_radii, draws, 1)
    references = _manifold_draws(*reference_sets, real_radii, draws, 2)
    for name, ratio in zip(MANIFOLD, RATIOS):
        results[name] = estimate(values[name]).with_reference(references[name][0])
        with np.errstate(invalid="ignore", divide="ignore"):
            found = estimate(values[name] / references[name])
        results[ratio] = unknown("the reference is 0") if found.value is None else found
    return results


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """FID of features (N, D) and (M, D): ‖μx − μy‖² + tr(Σx + Σy − 2 (Σx Σy)^½) (Heusel et al. 2017, eq. 6).

    With Σ = AᵀA the trace of the root is the sum of the singular values of Ax Ayᵀ. This needs no matrix root
    and holds for singular Σ.
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
    resamples = (Resamples.draw(one, draws, seed) for seed, one in enumerate((x_subjects, y_subjects)))
    rows = zip(*(one.rows() for one in resamples), strict=True)
    found = estimate(np.array([frechet_distance(x[i], y[j]) for i, j in rows]))
    value = found.value
    # Centered at the value: repeated rows bias the FID of every bootstrap sample.
    half = np.nan if found.low is None else (found.high - found.low) / 2
    few, width = min(len(x), len(y)), x.shape[1]
    singular = f"{few} slices for {width} features: the covariances are singular; read KID instead"
    note = singular if few <= width else ""
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
    of features (N, D) and (M, D). It can be negative if the two distributions are equal.

    Pairs of rows of one subject are excluded, as the usual estimate excludes a row with itself. Bootstrap
    samples exclude the same pairs, so they are unbiased as well.
    """
    x_sums, y_sums = _subject_sums(x_subjects), _subject_sums(y_subjects)
    x_size, y_size = x_sums.sum(1), y_sums.sum(1)  # slices of each subject
    across = x_sums @ _cubic(x, y) @ y_sums.T  # summed over the pairs of slices of two subjects
    within_x, within_y = x_sums @ _cubic(x, x) @ x_sums.T, y_sums @ _cubic(y, y) @ y_sums.T
    np.fill_diagonal(within_x, 0)
    np.fill_diagonal(within_y, 0)

    def squared_mmd(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(B,), of subjects with multiplicities u (B, subjects of x) and v (B, subjects of y)."""
        pairs_x = (u @ x_size) ** 2 - (u**2) @ (x_size**2)
        pairs_y = (v @ y_size) ** 2 - (v**2) @ (y_size**2)
        return (
            ((u @ within_x) * u).sum(1) / pairs_x
            + ((v @ within_y) * v).sum(1) / pairs_y
            - 2 * ((u @ across) * v).sum(1) / ((u @ x_size) * (v @ y_size))
        )

    u, v = (Resamples.draw(one, draws, seed).times for seed, one in enumerate((x_subjects, y_subjects), seed))
    with np.errstate(invalid="ignore"):  # a bootstrap sample of a single subject has no pairs
        return estimate(squared_mmd(u, v))


def kernel_variance(features: np.ndarray, subjects: np.ndarray) -> float:
    """Variance of rows (N, D) in the space of KID's kernel: E k(x, x) - E k(x, x'), x' of another subject."""
    kernel = _cubic(features, features)
    other = np.asarray(subjects)[:, None] != subjects
    return float(kernel.diagonal().mean() - kernel[other].mean())


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel = x @ y.T / x.shape[1] + 1
    return kernel * kernel * kernel  # ten times as fast as a power


def _subject_sums(subjects: np.ndarray) -> sparse.csr_array:
    """Indicator matrix (subjects, rows), which sums rows by subject."""
    names, inverse = np.unique(subjects, return_inverse=True)
    ones = np.ones(len(inverse))
    return sparse.csr_array((ones, (inverse, np.arange(len(inverse)))), shape=(len(names), len(inverse)))


def manifold_metrics(
    real: np.ndarray,
    other: np.ndarray,
    real_subjects: np.ndarray,
    other_subjects: np.ndarray,
    *,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """Precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2, k = 3), density and coverage (Naeem et al.
    2020, eq. 3 and 4, k = 5), of features (N, D) and (M, D).

    The ball of a slice reaches to its k-th nearest slice of another subject. The intervals resample, by
    subject, the slices that are counted; the balls are kept.
    """
    real_radii = _real_radii(real, real_subjects)
    found = _manifold_draws(real, other, real_subjects, other_subjects, real_radii, draws)
    return {name: estimate(values) for name, values in found.items()}


def _manifold_draws(
    real: np.ndarray,
    other: np.ndarray,
    real_subjects: np.ndarray,
    other_subjects: np.ndarray,
    real_radii: tuple[np.ndarray, np.ndarray],
    draws: int,
    seed: int = 1,
) -> dict[str, np.ndarray]:
    """The bootstrap draws (B + 1,) of each of MANIFOLD; `seed` is that of `other`, of `real` it is 0.

    `real_radii` are those of `real` to the third and the fifth neighbor.
    """
    distances = cdist(real, other)  # (N, M)
    real_3, real_5 = (one[:, None] for one in real_radii)
    of_real = Resamples.draw(real_subjects, draws, 0)
    of_other = Resamples.draw(other_subjects, draws, seed)
    return {
        "precision": of_other.mean((distances <= real_3).any(0)),
        "recall": of_real.mean((distances <= radii(other, other_subjects, 3)).any(1)),
        "density": of_other.mean((distances <= real_5).sum(0) / 5),
        "coverage": of_real.mean((distances <= real_5).any(1)),
    }


def _real_radii(real: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The balls of precision and recall, and those of density and coverage."""
    return radii(real, subjects, 3), radii(real, subjects, 5)


def radii(features: np.ndarray, subjects: np.ndarray, k: int) -> np.ndarray:
    """Distance (N,) of each row of features (N, D) to its k-th nearest row of another subject."""
    distances = cdist(features, features)
    distances[subjects[:, None] == subjects] = np.inf
    return np.partition(distances, k - 1, axis=1)[:, k - 1]


def structural_similarity(images: ImageSet, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Mean MS-SSIM (Wang et al. 2003) of pairs of one class and two subjects; lower means more diverse.

    Every slice is in one pair at most. Slices below 176 pixels are compared at fewer scales (64 pixels: three
    of five), whose weights are rescaled to a sum of one.
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
        return unknown("all slices of a class are of the same subject")

    scales = max(n for n in range(1, 6) if images.images.shape[-1] // max(1, n - 1) ** 2 > 10)
    betas = tuple(beta / sum(_BETAS[:scales]) for beta in _BETAS[:scales])
    pixels = images.images.float() / 255  # in [0, 1]: the background must be 0
    values = [
        multiscale_structural_similarity_index_measure(
            pixels[first[batch]], pixels[second[batch]], data_range=1.0, betas=betas, reduction=None
        )
        for batch in np.array_split(np.arange(len(first)), len(first) // 64 + 1)
    ]
    scores = torch.cat(values).numpy()
    return estimate(Resamples.draw(np.arange(len(scores)), draws, seed).mean(scores))
