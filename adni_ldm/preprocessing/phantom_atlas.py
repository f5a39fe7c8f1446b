"""What phantom subjects are made from: MNI152, its masks, and the displacement fields of disease."""

import dataclasses
import functools

import numpy as np
from scipy import ndimage


@dataclasses.dataclass(frozen=True)
class Atlas:
    """Template volumes (X, Y, Z) at 1 mm, and displacement fields at 2 mm.

    `intensity` is T1 in [0, 1], 0 outside the brain; `brain` and `ventricle` are masks in [0, 1], smoothed to
    be thresholded at 0.5. `ventricle_field` and `atrophy_field` (3, X/2, Y/2, Z/2) point from where tissue is
    to where it came from, at most about 1 long. `origin_mm` (3,) is the centre of voxel 0 of both grids.
    """

    intensity: np.ndarray
    brain: np.ndarray
    ventricle: np.ndarray
    ventricle_field: np.ndarray
    atrophy_field: np.ndarray
    origin_mm: np.ndarray


@functools.cache
def load_atlas() -> Atlas:
    """Compute template, masks and fields, once per process (5 s). Raises ImportError without nilearn."""
    from nilearn import datasets  # slow to import; the worker processes do without

    template = datasets.load_mni152_template(resolution=1)
    masks = (
        datasets.load_mni152_brain_mask(resolution=1),
        datasets.load_mni152_gm_template(resolution=1),
        datasets.load_mni152_wm_template(resolution=1),
    )
    # Crop to 8 mm around the brain; the rest of the grid is air.
    intensity, brain, grey, white = (np.asarray(v.dataobj, np.float32) for v in (template, *masks))
    inside = ndimage.find_objects((brain > 0).astype(int))[0]
    crop = tuple(slice(max(s.start - 8, 0), s.stop + 8) for s in inside)
    origin = template.affine[:3, 3] + [s.start for s in crop]
    intensity, brain, grey, white = (v[crop] for v in (intensity, brain, grey, white))

    brain = ndimage.binary_fill_holes(brain > 0)
    fluid = brain & (grey + white < 0.5)
    ventricle = _lateral_ventricles(fluid, origin)
    sulci = fluid & ~ndimage.binary_dilation(ventricle, iterations=2)

    # Each field is (normal of the nearest surface) * (decay with the distance to it).
    to_ventricle, ventricle_normal = _distance_and_normal(ventricle)
    to_surface, surface_normal = _distance_and_normal(brain)
    to_sulcus, sulcus_normal = _distance_and_normal(sulci)
    ventricle_field = -ventricle_normal * np.exp(-np.maximum(to_ventricle, 0) / 12)
    atrophy_field = surface_normal * np.exp(np.minimum(to_surface, 0) / 12)
    atrophy_field -= 0.4 * sulcus_normal * np.exp(-np.maximum(to_sulcus, 0) / 3)
    return Atlas(
        intensity=intensity * brain,
        brain=ndimage.gaussian_filter(brain.astype(np.float32), 0.7),
        ventricle=ndimage.gaussian_filter(ventricle.astype(np.float32), 0.7),
        ventricle_field=ventricle_field,
        atrophy_field=atrophy_field,
        origin_mm=origin.astype(np.float32),
    )


def _lateral_ventricles(fluid: np.ndarray, origin_mm: np.ndarray) -> np.ndarray:
    """The connected fluid about both frontal horns; the box excludes the ambient cistern and the sulci."""
    low, high = (np.array(corner) - origin_mm for corner in ([-36, -58, -22], [37, 42, 34]))
    box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    boxed = np.zeros_like(fluid)
    boxed[box] = fluid[box]
    components, _ = ndimage.label(boxed)
    horns = [components[tuple((np.array(p) - origin_mm).astype(int))] for p in ([-8, 5, 18], [8, 5, 18])]
    return np.isin(components, horns) & boxed


def _distance_and_normal(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance in mm (X/2, Y/2, Z/2), negative inside, and its gradient (3, X/2, Y/2, Z/2).

    The distance is smoothed by 1.5 mm, so the gradient fades where two walls are equally near instead of
    changing sign: a flow along it stops in the middle of a ventricle and remains invertible.
    """
    distance = ndimage.distance_transform_edt(~mask).astype(np.float32)
    distance -= ndimage.distance_transform_edt(mask).astype(np.float32)
    distance = ndimage.gaussian_filter(distance, 1.5)
    gradient = np.stack([g[::2, ::2, ::2] for g in np.gradient(distance)])
    return distance[::2, ::2, ::2], gradient
