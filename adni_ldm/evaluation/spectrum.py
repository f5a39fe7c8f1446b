"""Power spectrum of slices by spatial frequency: what samples that are too smooth, or too noisy, lack or add.

The autoencoder and the denoiser both lose fine detail. The reconstructions of held-out slices beside the
samples tell which of them it was.
"""

from __future__ import annotations

import numpy as np
import torch

from adni_ldm.evaluation.estimates import Estimate, Resamples, estimate, unknown
from adni_ldm.evaluation.image_sets import ImageSet, too_few

# Radial frequency as a share of Nyquist's, half a cycle a pixel. Below is the shape of the head, which the
# anatomical measures compare.
BANDS = {"0.15 to 0.35": (0.15, 0.35), "0.35 to 0.6": (0.35, 0.6), "above 0.6": (0.6, 1.0)}


def radial_power(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Radially averaged power of slices (N, 1, H, H) in [-1, 1].

    Returns:
        frequencies (H // 2,), as shares of Nyquist's frequency, and |F|² averaged over the ring around each,
        (N, H // 2) float64. Slices are in units of their range, [0, 1].
    """
    side = images.shape[-1]
    along = torch.fft.fftfreq(side) * side
    ring = torch.hypot(along[:, None], along[None, :]).round().long().flatten()
    kept = (ring >= 1) & (ring <= side // 2)
    counts = torch.bincount(ring[kept], minlength=side // 2 + 1)[1:]
    parts = []
    for some in images.split(256):
        spectrum = torch.fft.fft2((some[:, 0].double() + 1) / 2).abs().square().flatten(1)[:, kept]
        sums = torch.zeros(len(some), side // 2 + 1, dtype=torch.float64)
        parts.append(sums.index_add(1, ring[kept], spectrum)[:, 1:] / counts)
    return np.arange(1, side // 2 + 1) / (side // 2), torch.cat(parts).numpy()


def band_power(images: torch.Tensor) -> dict[str, np.ndarray]:
    """Power (N,) of slices (N, 1, H, H) in [-1, 1] in each of BANDS."""
    frequencies, power = radial_power(images)
    return {
        name: power[:, (low <= frequencies) & (frequencies <= high)].mean(1)
        for name, (low, high) in BANDS.items()
    }


def compare_spectra(
    real: ImageSet,
    real_power: dict[str, np.ndarray],
    other: ImageSet,
    other_power: dict[str, np.ndarray],
    *,
    seed: int = 0,
    draws: int = 1000,
) -> dict[str, Estimate]:
    """Mean power ÷ that of real slices in each of BANDS, every class counting alike; reference 1.

    Args:
        real_power, other_power: `band_power` of the two sets, (N,) and (M,) a band.
    """
    if problem := too_few(other, real):
        return dict.fromkeys(BANDS, unknown(problem))
    sides = ((real, real_power), (other, other_power))
    means = []
    for which, (images, power) in enumerate(sides):
        by_class = []
        for label in range(len(real.class_names)):
            rows = images.labels == label
            resamples = Resamples.draw(images.subjects[rows], draws, [seed, which, label])
            by_class.append([resamples.mean(power[name][rows]) for name in BANDS])
        means.append(np.mean(by_class, axis=0))  # (bands, B + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = means[1] / means[0]
    return {name: estimate(ratio).with_reference(1.0) for name, ratio in zip(BANDS, ratios)}


def measure_spectra(
    held_out: ImageSet, samples: ImageSet, reconstructions: torch.Tensor | None, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Power by frequency band relative to held-out slices: of samples, and of reconstructions of the slices,
    (N, 1, H, H) in [-1, 1]."""
    real = held_out, band_power(held_out.floats())
    spectra = {"samples": compare_spectra(*real, samples, band_power(samples.floats()), seed=seed)}
    if reconstructions is not None:
        power = band_power(reconstructions)
        spectra["reconstructions"] = compare_spectra(*real, held_out, power, seed=seed)
    return spectra
