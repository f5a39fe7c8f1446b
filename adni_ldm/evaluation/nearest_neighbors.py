"""The nearest training image of a slice: in pixels after alignment, or in features.

In pixels: pictures are brought to 64 pixels a side and band-passed (a difference of Gaussians), which takes
out brightness, slow shading and the noise of pixels; the rest is compared by normalized cross-correlation, at
its highest over small shifts (distance = 1 - correlation, so gain and offset do not matter either).

How near is near depends on the place: usual brains have many neighbours, unusual ones none. So the distance
is also given relative to its surroundings, as a ratio: the distance to the nearest image, divided by the mean
distance to the nearest images of the next five *subjects*. It is about 1 for a new person, whose picture is
as far from one as from the other, and near 0 for a copy, which one person's image alone explains (the idea of
Carlini et al. 2023, arXiv:2301.13188, section 5, with subjects for images).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

SIDE = 64  # pixels that pictures are compared at: what a copy shares with its original is not finer
FINE, COARSE = 1 / 48, 1 / 16  # standard deviations of the two Gaussians, as shares of the side
SURROUNDINGS = 5  # subjects
_CHUNK = 64  # rows that are searched at once
_NEAREST, _SUBJECTS = 16, 32  # what the quick search leaves: the nearest images, and the nearest subjects'


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each of N pictures."""

    rows: np.ndarray  # int64 (N,), of the training set
    distances: np.ndarray  # float64 (N,), 0 is the same picture
    ratios: np.ndarray  # float64 (N,), to the distance of the next subjects; 1 where there is no other
    shifts: np.ndarray | None = (
        None  # int64 (N, 2): pixels down and right from the training image to the picture
    )

    def __len__(self) -> int:
        return len(self.rows)


def nearest_in_pixels(images: torch.Tensor, train: torch.Tensor, train_subjects: np.ndarray) -> Neighbours:
    """Nearest training image in aligned pixels: shifts of up to a sixteenth of the side, at least 3 pixels.

    A quick search over all training images at 16 pixels a side leaves some 48 that are compared finely.

    Args:
        images: uint8 (N, 1, H, W).
        train: uint8 (M, 1, H, W), with the subject of each (M,).
    """
    if images.shape[1:] != train.shape[1:]:
        raise ValueError(f"images of {tuple(images.shape[1:])} compared with {tuple(train.shape[1:])}")
    reach = max(SIDE // 16, -(-3 * SIDE // min(images.shape[-2:])))  # in pixels compared
    patterns, train_patterns = band_pass(images), band_pass(train)  # (N, S, S), (M, S, S)
    train_thumbnails = _thumbnails(train_patterns)
    subjects = np.unique(train_subjects, return_inverse=True)[1]

    nothing = np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros((0, 2), np.int64)
    found = [nothing]
    for first in tqdm(range(0, len(images), _CHUNK), desc="nearest training images", leave=False):
        some = patterns[first : first + _CHUNK]
        candidates = _candidates(_quick_similarity(some, train_thumbnails, reach), subjects)  # (B, K)
        distances, shifts = _aligned_distances(some, train_patterns, candidates, reach)
        rows, nearest, ratios, places = _closest(distances, candidates, subjects)
        found.append((rows, nearest, ratios, shifts[np.arange(len(rows)), places]))
    rows, distances, ratios, shifts = (np.concatenate(parts) for parts in zip(*found))
    pixels = np.array(images.shape[-2:]) / SIDE
    return Neighbours(rows, distances, ratios, np.rint(shifts * pixels).astype(np.int64))


def nearest_in_features(features: np.ndarray, train: np.ndarray, train_subjects: np.ndarray) -> Neighbours:
    """Nearest training image by Euclidean distance of feature vectors (N, D) and (M, D)."""
    subjects = np.unique(train_subjects, return_inverse=True)[1]
    every = np.arange(len(train))
    found = [(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]
    for some in torch.as_tensor(features, dtype=torch.float64).split(_CHUNK):
        distances = torch.cdist(some, torch.as_tensor(train, dtype=torch.float64)).numpy()
        rows = np.broadcast_to(every, distances.shape)
        if len(rows):  # split gives one empty part of nothing
            found.append(_closest(distances, rows, subjects)[:3])
    return Neighbours(*(np.concatenate(parts) for parts in zip(*found)))


def band_pass(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Patterns float32 (N, S, S), zero mean, unit norm, of uint8 (N, 1, H, W); 0 where nothing is shown."""
    frequencies = torch.meshgrid(torch.fft.fftfreq(side), torch.fft.rfftfreq(side), indexing="ij")
    squared = 2 * (torch.pi * side) ** 2 * sum(one**2 for one in frequencies)  # of a Gaussian's transform
    band = torch.exp(-squared * FINE**2) - torch.exp(-squared * COARSE**2)
    patterns = []
    for some in images.split(1024):
        reduced = some.float() / 255
        if reduced.shape[-2:] != (side, side):
            reduced = F.interpolate(reduced, (side, side), mode="bicubic", antialias=True)
        pattern = torch.fft.irfft2(torch.fft.rfft2(reduced[:, 0]) * band, s=(side, side))
        patterns.append(_unit(pattern))
    return torch.cat(patterns)


def _unit(patterns: torch.Tensor) -> torch.Tensor:
    """Each of (N, h, w) with norm 1. One whose contrast is rounding error becomes 0, and so is like none."""
    norm = patterns.square().sum((1, 2), keepdim=True).sqrt()
    return torch.where(norm > 1e-4 * patterns.shape[-1], patterns / norm.clamp(min=1e-12), 0)


def _thumbnails(patterns: torch.Tensor) -> torch.Tensor:
    return _unit(F.adaptive_avg_pool2d(patterns[:, None], 16)[:, 0]).flatten(1)  # (N, 256)


def _quick_similarity(patterns: torch.Tensor, train_thumbnails: torch.Tensor, reach: int) -> torch.Tensor:
    """(B, M): correlation of thumbnails, the highest over shifts that are made before reducing."""
    steps = range(-reach, reach + 1, max(1, patterns.shape[-1] // 32))
    best = torch.full((len(patterns), len(train_thumbnails)), -1.0)
    for down in steps:
        for right in steps:
            moved = _thumbnails(patterns.roll((down, right), (1, 2)))
            torch.maximum(best, moved @ train_thumbnails.T, out=best)
    return best


def _candidates(similarity: torch.Tensor, subjects: np.ndarray) -> np.ndarray:
    """Rows (B, K): the most similar images, then the best image of each of the most similar subjects."""
    order = similarity.argsort(dim=1, descending=True).numpy()
    # of each subject, where in the order it comes first
    firsts = [np.sort(np.unique(subjects[row], return_index=True)[1])[:_SUBJECTS] for row in order]
    return np.stack([np.concatenate([row[:_NEAREST], row[first]]) for row, first in zip(order, firsts)])


def _aligned_distances(
    patterns: torch.Tensor, train_patterns: torch.Tensor, candidates: np.ndarray, reach: int
) -> tuple[np.ndarray, np.ndarray]:
    """Distance (B, K) of each of (B, S, S) to its candidates at the best shift, and that shift (B, K, 2)."""
    side, window = patterns.shape[-1], 2 * reach + 1
    spectrum = torch.fft.rfft2(patterns)[:, None]  # (B, 1, S, S // 2 + 1)
    others = torch.fft.rfft2(train_patterns[torch.from_numpy(candidates)])  # (B, K, S, S // 2 + 1)
    correlation = torch.fft.irfft2(spectrum * others.conj(), s=(side, side))
    correlation = correlation.roll((reach, reach), (2, 3))[..., :window, :window].flatten(2)
    best, place = correlation.max(dim=2)
    shifts = torch.stack([place // window - reach, place % window - reach], dim=2)
    distances = (1 - best.double()).numpy()
    return np.where(distances < 1e-5, 0, distances), shifts.numpy()  # float32 knows no better


def _closest(distances: np.ndarray, rows: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, ...]:
    """Row of the nearest training image, distance, ratio, and which candidate it was; each (B,)."""
    order = np.argsort(distances, axis=1, kind="stable")
    ratios = np.ones(len(order))
    for index, places in enumerate(order):
        first = np.sort(np.unique(subjects[rows[index, places]], return_index=True)[1])
        of_subjects = distances[index, places[first]]  # ascending, one a subject
        around = of_subjects[1 : 1 + SURROUNDINGS]
        if len(around) and around.mean() > 0:  # all alike: nobody's copy
            ratios[index] = of_subjects[0] / around.mean()
    picked, nearest = np.arange(len(order)), order[:, 0]
    return rows[picked, nearest], distances[picked, nearest], ratios, nearest
