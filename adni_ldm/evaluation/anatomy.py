"""Areas of brain and lateral ventricle in a slice, by intensity and position.

Neither metadata nor learned weights are used: real slices, phantoms and samples are measured alike. For
T1-weighted sagittal slices of a skull-stripped brain on black, within about 25 mm of the mid-plane, with
anterior left and superior up. Lengths are in mm, or relative to the brain's radius r = sqrt(area / pi), so
the measures do not depend on the number of pixels.

Brain: pixels brighter than a fifth of the median tissue intensity; opening against noise, the largest
component, closing by 3 mm over sulci that reach the outline, holes filled.

Ventricle: each pixel is weighted from 0 for tissue to 1 for fluid by its intensity, which accounts for
partial volume and makes 3-mm pixels usable. Position separates the ventricle from other fluid: in MNI152, in
every plane, it lies within 0.7 r anterior, 0.3 r posterior and 0.2 r superior or inferior of the brain's
centroid. A component with enough clear fluid, most of it in this inner region, is counted within a wider
region: an enlarged ventricle extends beyond the inner region, cisterns and sulci only reach into it.

Cortical border: the contour at half of the tissue intensity, ventricle filled; sulci lengthen it and blur
shortens it. Blobs: pixels brighter than a fifth of the tissue intensity more than 3 mm outside the brain.

On the phantom (1,000 slices of 64 pixels) the Pearson correlation with the true area is 0.999 for the brain
and 0.986 for the ventricle.
"""

from __future__ import annotations

import numpy as np
import torch
from contourpy import contour_generator
from scipy import ndimage
from tqdm.auto import tqdm

MEASURES = {  # name: label
    "ventricle_ratio": "lateral ventricle ÷ brain",
    "ventricle_mm2": "lateral ventricle, mm²",
    "brain_mm2": "brain, mm²",
    "border_mm": "cortical border, mm",
    "blobs_mm2": "bright areas outside the brain, mm²",
    "intensity": "intensity of the brain, 0 to 1",
}

TISSUE, FLUID = 0.85, 0.45  # intensity of pure tissue and pure fluid, relative to the brain's median
EDGE = 0.3  # fluid fraction at the boundary of a component
CLEAR = 0.6  # fluid fraction from which a pixel is clearly fluid
MIN_CLEAR_MM2 = 25.0  # clear fluid that a component needs; less is a sulcus or noise


def ventricle_area(images: torch.Tensor | np.ndarray, pixel_mm: float) -> np.ndarray:
    """Area of the lateral ventricle, mm², (B,) float64: `measure_anatomy` of one measure."""
    slices = _as_slices(images, pixel_mm)
    weights = (ventricle_weights(one, brain_mask(one, pixel_mm), pixel_mm) for one in slices)
    return np.array([weight.sum() * pixel_mm**2 for weight in weights], dtype=np.float64)


def measure_anatomy(
    images: torch.Tensor | np.ndarray, pixel_mm: float, progress: bool = False
) -> dict[str, np.ndarray]:
    """Each of MEASURES, (B,) float64, of slices (B, 1, H, W) in [-1, 1] with pixels of pixel_mm a side.

    Without a brain the areas are 0 and the ratio is NaN.

    Raises:
        ValueError: another shape, intensities outside [-1, 1], or pixel_mm not above 0.
    """
    slices = _as_slices(images, pixel_mm)
    rows = np.zeros((len(slices), len(MEASURES)))
    for row, image in zip(rows, tqdm(slices, desc="measuring anatomy", disable=not progress, leave=False)):
        brain = brain_mask(image, pixel_mm)
        weights = ventricle_weights(image, brain, pixel_mm)
        brain_mm2, ventricle_mm2 = brain.sum() * pixel_mm**2, weights.sum() * pixel_mm**2
        border = _border_length(image, brain, weights > EDGE) * pixel_mm
        blobs = _blobs(image, brain, pixel_mm).sum() * pixel_mm**2
        ratio = ventricle_mm2 / brain_mm2 if brain_mm2 else np.nan
        intensity = image[brain].mean() if brain.any() else 0.0
        row[:] = ratio, ventricle_mm2, brain_mm2, border, blobs, intensity
    return dict(zip(MEASURES, rows.T))


def _as_slices(images: torch.Tensor | np.ndarray, pixel_mm: float) -> np.ndarray:
    """(B, H, W) float32 in [0, 1], from a tensor on any device or an array (B, 1, H, W) in [-1, 1]."""
    array = torch.as_tensor(images).detach().to("cpu", torch.float32).numpy()
    if array.ndim != 4 or array.shape[1] != 1:
        raise ValueError(f"images have shape {tuple(array.shape)}: give (B, 1, H, W)")
    if not pixel_mm > 0:
        raise ValueError(f"pixel_mm={pixel_mm}: give the side of a pixel in mm")
    if array.size and not (-1.01 <= array.min() and array.max() <= 1.01):  # NaN fails too
        raise ValueError(f"images span {array.min():.3g} to {array.max():.3g}: give intensities in [-1, 1]")
    return (array[:, 0] + 1) / 2


def brain_mask(image: np.ndarray, pixel_mm: float) -> np.ndarray:
    """Filled mask (H, W) of the brain in a slice (H, W) in [0, 1]; empty where there is none."""
    shown = image > 0.25 * np.percentile(image, 99)
    if not shown.any():
        return shown
    mask = image > 0.2 * np.median(image[shown])
    if pixel_mm < 2:  # coarser pixels are already averages, and opening would remove thin parts
        mask = ndimage.binary_opening(mask)
    pieces, count = ndimage.label(mask)
    if count == 0:
        return mask
    mask = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    reach = max(1, round(3 / pixel_mm))
    mask = np.pad(mask, reach)  # so that closing does not erode at the image border
    mask = ndimage.binary_fill_holes(ndimage.binary_closing(mask, iterations=reach))
    return mask[reach:-reach, reach:-reach]


def ventricle_weights(image: np.ndarray, brain: np.ndarray, pixel_mm: float) -> np.ndarray:
    """Fraction of each pixel that is lateral ventricle, (H, W) in [0, 1]; anterior left, superior up."""
    if not brain.any():
        return np.zeros(image.shape)
    radius = np.sqrt(brain.sum() / np.pi)  # in pixels
    centre = ndimage.center_of_mass(brain)
    up, front = ((c - i) / radius for c, i in zip(centre, np.indices(image.shape), strict=True))
    inner = _region(up, front, half_up=0.28, half_front=0.56, behind=0.05, lowest=-0.07)
    outer = _region(up, front, half_up=0.40, half_front=0.72, behind=0.00, lowest=-0.20) & brain
    relative = image / np.median(image[brain])
    fluid = outer * np.clip((TISSUE - relative) / (TISSUE - FLUID), 0, 1)

    pieces, count = ndimage.label(fluid > EDGE)
    clear = np.bincount(pieces.ravel(), (fluid > CLEAR).ravel(), count + 1)  # pixels of each component
    central = np.bincount(pieces.ravel(), (inner & (fluid > CLEAR)).ravel(), count + 1)
    kept = (clear * pixel_mm**2 >= MIN_CLEAR_MM2) & (central > 0.5 * clear)
    kept[0] = False  # background
    return np.where(kept[pieces], fluid, 0)


def _border_length(image: np.ndarray, brain: np.ndarray, ventricle: np.ndarray) -> float:
    """Length in pixels of the contour at half of the tissue intensity, the ventricle filled."""
    if not brain.any():
        return 0.0
    tissue = np.median(image[brain])
    cortex = np.where(ndimage.binary_dilation(brain, iterations=2), image, 0)
    cortex = np.pad(np.where(ndimage.binary_dilation(ventricle), tissue, cortex), 1)
    lines = contour_generator(z=cortex).lines(0.5 * tissue)
    return float(sum(np.linalg.norm(np.diff(line, axis=0), axis=1).sum() for line in lines))


def _blobs(image: np.ndarray, brain: np.ndarray, pixel_mm: float) -> np.ndarray:
    """Mask of bright pixels more than 3 mm outside the brain."""
    if not brain.any():
        return np.zeros(image.shape, bool)
    near = ndimage.binary_dilation(brain, iterations=max(1, round(3 / pixel_mm)))
    return (image > 0.2 * np.median(image[brain])) & ~near


def _region(
    up: np.ndarray, front: np.ndarray, half_up: float, half_front: float, behind: float, lowest: float
) -> np.ndarray:
    """An ellipse around the usual center of the ventricle, in brain radii from the brain's centroid.

    Its inferior posterior part is excluded: behind `behind` and below `lowest` is the quadrigeminal cistern.
    """
    ellipse = ((front - 0.17) / half_front) ** 2 + ((up - 0.03) / half_up) ** 2 < 1
    return ellipse & ((front > behind) | (up > lowest))
