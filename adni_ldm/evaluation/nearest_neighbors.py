"""Nearest training image of a slice, in pixels after alignment.

Images are resized to 64 x 64 and band-pass filtered (difference of Gaussians), which removes brightness,
shading and pixel noise. They are compared by normalized cross-correlation, maximized over small shifts and
rotations (distance = 1 - correlation, which is invariant to gain and offset).

Typical brains have many near neighbors and unusual ones have none, so the distance is also given as a ratio:
the distance to the nearest image divided by the mean distance to the nearest images of the next five
*subjects*. The ratio is about 1 for a new subject and near 0 for a copy, which one training subject alone
explains (Carlini et al. 2023, arXiv:2301.13188, section 5, with subjects in place of images).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

SIDE = 64  # pixels per side at which images are compared; copies need not share finer detail
FINE, COARSE = 1 / 48, 1 / 16  # standard deviations of the two Gaussians, as shares of the side
TURNS = (0.0, -4.0, 4.0)  # degrees by which an image is rotated; a copy within 2 of one is found
NEXT_SUBJECTS = 5  # whose nearest images the distance is compared with
_CHUNK = 64  # rows that are searched at once
_NEAREST, _SUBJECTS = 16, 32  # candidates left by the coarse search: images, and one image per subject


@dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each of N images."""

    rows: np.ndarray  # int64 (N,), of the training set
    distances: np.ndarray  # float64 (N,), 0 for the same image
    ratios: np.ndarray  # float64 (N,), to the distance of the next subjects; 1 where there is no other
    shifts: np.ndarray  # int64 (N, 2): pixels down and right from the training image to the image

    def __len__(self) -> int:
        return len(self.rows)


@torch.autocast("cpu", enabled=False)  # float32, regardless of the caller's autocast
def nearest_in_pixels(
    images: torch.Tensor,
    train: torch.Tensor,
    train_subjects: np.ndarray,
    allowed: np.ndarray | None = None,
) -> Neighbors:
    """Nearest training image after alignment by rotations of up to about 6 degrees and shifts of up to 1/16
    of the side, at least 3 pixels.

    A coarse search over all training images at 16 x 16 pixels gives the rotation of an image, and leaves at
    most 48 for the fine comparison.

    Args:
        images: uint8 (N, 1, H, W).
        train: uint8 (M, 1, H, W), with the subject of each (M,).
        allowed: bool (N, M), which training images are searched for each image; None: all. An image without
            any has the distance infinity, and the ratio 1.
    """
    if images.shape[1:] != train.shape[1:]:
        raise ValueError(f"images of {tuple(images.shape[1:])} compared with {tuple(train.shape[1:])}")
    reach = max(SIDE // 16, -(-3 * SIDE // min(images.shape[-2:])))  # in pixels compared
    train_patterns = band_pass(train)  # (M, S, S)
    train_thumbnails = _thumbnails(train_patterns)
    subjects = np.unique(train_subjects, return_inverse=True)[1]

    found = [(np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros((0, 2), np.int64))]
    for first in tqdm(range(0, len(images), _CHUNK), desc="nearest training images", leave=False):
        some = images[first : first + _CHUNK]
        turned = [band_pass(_turn(some, degrees)) for degrees in TURNS]  # (B, S, S) each
        similar = [_coarse_similarity(one, train_thumbnails, reach) for one in turned]  # (B, M) each
        best = torch.stack([one.amax(1) for one in similar]).argmax(0)  # (B,) the rotation of each image
        each = torch.arange(len(some))
        patterns, similarity = (torch.stack(one)[best, each] for one in (turned, similar))
        if allowed is not None:
            searched = allowed[first : first + _CHUNK]
            similarity = similarity.masked_fill(~torch.from_numpy(searched), -2)  # below any correlation
        candidates = _candidates(similarity, subjects)  # (B, K)
        distances, shifts = _aligned_distances(patterns, train_patterns, candidates, reach)
        if allowed is not None:
            distances = np.where(np.take_along_axis(searched, candidates, axis=1), distances, np.inf)
        rows, nearest, ratios, places = _closest(distances, candidates, subjects)
        found.append((rows, nearest, ratios, shifts[np.arange(len(rows)), places]))
    rows, distances, ratios, shifts = (np.concatenate(parts) for parts in zip(*found))
    pixels = np.array(images.shape[-2:]) / SIDE
    return Neighbors(rows, distances, ratios, np.rint(shifts * pixels).astype(np.int64))


def _turn(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """uint8 (N, 1, H, W) rotated about the center, counter-clockwise; the border is repeated outside."""
    if not degrees:
        return images
    angle = math.radians(degrees)
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    grid = F.affine_grid(rotation.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return turned.round().to(torch.uint8)


def band_pass(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Patterns float32 (N, S, S), zero mean, unit norm, of uint8 (N, 1, H, W); 0 for a constant image."""
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
    """Each of (N, h, w) scaled to norm 1. Contrast below rounding error becomes 0."""
    norm = patterns.square().sum((1, 2), keepdim=True).sqrt()
    return torch.where(norm > 1e-4 * patterns.shape[-1], patterns / norm.clamp(min=1e-12), 0)


def _thumbnails(patterns: torch.Tensor) -> torch.Tensor:
    return _unit(F.adaptive_avg_pool2d(patterns[:, None], 16)[:, 0]).flatten(1)  # (N, 256)


def _coarse_similarity(patterns: torch.Tensor, train_thumbnails: torch.Tensor, reach: int) -> torch.Tensor:
    """(B, M): correlation of thumbnails, maximized over shifts that are applied before downsampling."""
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
    # position of each subject's first image in the order
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
    return np.where(distances < 1e-5, 0, distances), shifts.numpy()  # below float32 precision


def _closest(distances: np.ndarray, rows: np.ndarray, subjects: np.ndarray) -> tuple[np.ndarray, ...]:
    """Row of the nearest training image, its distance and ratio, and its place among the candidates, (B,)."""
    order = np.argsort(distances, axis=1, kind="stable")
    ratios = np.ones(len(order))
    for index, places in enumerate(order):
        first = np.sort(np.unique(subjects[rows[index, places]], return_index=True)[1])
        of_subjects = distances[index, places[first]]  # ascending, one per subject
        around = of_subjects[1 : 1 + NEXT_SUBJECTS]
        around = around[np.isfinite(around)]  # infinite: not searched
        if len(around) and around.mean() > 0:  # zero if all are identical: no subject is copied
            ratios[index] = of_subjects[0] / around.mean()
    picked, nearest = np.arange(len(order)), order[:, 0]
    return rows[picked, nearest], distances[picked, nearest], ratios, nearest
