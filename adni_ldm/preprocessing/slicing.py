"""Slices of a volume: the settings, the centre of the brain, its intensity range, and the sampling of pixels.

Each pixel is the mean of the scan over its own box, pixel x pixel x 1 mm, interpolated once from the
scanner's voxels: orientation, spacing, registration and field of view are one affine map, and no volume is
resampled in between.

Slices have the radiological orientation, as the phantom's: superior is up in the sagittal and coronal planes,
anterior is up in the axial plane; anterior is left in the sagittal plane, the patient's right in the others.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from adni_ldm.errors import UserError
from adni_ldm.preprocessing.volumes import Volume, VolumeError

PLANES = {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}  # axes: normal, down, to the right
CENTRE_MM = np.array([0.0, -17.0, 4.0])  # centre of the brain of MNI152, which slices are centred on
THICKNESS_MM = 1.0
HEAD_TOP_MM = 110.0  # from the vertex down to about the nose: the part of a head that is mostly brain
BRAIN_TOP_MM = 74.0  # from the vertex of a skull-stripped brain to its centre
SCALP_TOP_MM = 86.0  # from the vertex of the scalp to the centre of the brain
STRIPPED = 0.5  # skull-stripping leaves more than this share of the voxels at one value
BRAIN_RADII_MM = np.array([50.0, 65.0, 45.0])  # of an ellipsoid about the centre that lies within most brains
BRAIN_LITRES = (0.5, 2.5)


@dataclasses.dataclass(frozen=True)
class SlicingSettings:
    """How slices are made of a scan. Raises UserError for a value out of range."""

    plane: str = "sagittal"
    slices: int = 20
    spacing_mm: float = 2.0  # from slice to slice
    image_size: int = 256  # pixels per side
    field_of_view_mm: float = 256.0  # side of a slice
    register: str = "none"  # or mni: the slices are in the template's space
    brain_mask: str = "none"  # or mni, or a pattern of files beside the scan: {name}_mask.nii.gz
    percentiles: tuple[float, float] = (0.5, 99.5)  # of the brain's intensity: black and white
    bits: int = 8

    def __post_init__(self):
        limits = {"slices": (1, 100), "image_size": (16, 2048), "spacing_mm": (0.1, 50)}
        for name, (low, high) in (limits | {"field_of_view_mm": (50, 500)}).items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}={getattr(self, name)}: choose {low} to {high}")
        if self.plane not in PLANES or self.register not in ("none", "mni") or self.bits not in (8, 16):
            raise UserError(f"plane={self.plane}, register={self.register}, bits={self.bits}: see --help")
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise UserError(f"percentiles={low:g},{high:g}: choose two between 0 and 100, the lower first")

    def as_dict(self) -> dict:
        """The settings as JSON has them."""
        return dataclasses.asdict(self) | {"percentiles": list(self.percentiles)}

    @property
    def needs_template(self) -> bool:
        return "mni" in (self.register, self.brain_mask)

    @property
    def mask_files(self) -> str | None:
        """The pattern of mask files, None without any."""
        return None if self.brain_mask in ("none", "mni") else self.brain_mask

    @property
    def positions_mm(self) -> np.ndarray:
        """Positions (S,) about the centre, to the right, anterior or superior: -19, -17 ... 19."""
        return (np.arange(self.slices) - (self.slices - 1) / 2) * self.spacing_mm

    @property
    def pixel_mm(self) -> float:
        return self.field_of_view_mm / self.image_size


def find_brain(volume: Volume) -> np.ndarray:
    """Estimate the centre of the brain (3,), RAS mm, in a head or in a skull-stripped brain.

    Takes the vertex, and the centroid of what is within HEAD_TOP_MM below it, without neck and jaw.
    """
    stride = np.maximum(1, np.round(4 / volume.spacing_mm)).astype(int)
    coarse = volume.voxels[tuple(slice(None, None, n) for n in stride)]
    coarse = ndimage.gaussian_filter(np.asarray(coarse, np.float32), 0.7)
    low, high = np.percentile(coarse, [2, 98])
    parts, _ = ndimage.label(coarse > low + 0.15 * (high - low))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    voxels = np.argwhere(parts == sizes.argmax()) * stride
    points = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]  # (N, 3)
    if sizes.max() < 100:
        raise VolumeError("no head found in the scan")
    top = np.sort(points[:, 2])[-12]  # a dozen coarse voxels: a single bright voxel of air does not count
    x, y, _ = points[points[:, 2] > top - HEAD_TOP_MM].mean(0)
    stripped = np.mean(volume.voxels == volume.voxels.flat[0]) > STRIPPED
    return np.array([x, y, top - (BRAIN_TOP_MM if stripped else SCALP_TOP_MM)])


def centre_of_mask(mask: Volume) -> np.ndarray:
    """Return the centre (3,), RAS mm, of a brain mask's bounding box. Raises VolumeError if it is none."""
    inside = mask.voxels > 0.5
    litres = np.count_nonzero(inside) * abs(np.linalg.det(mask.affine[:3, :3])) / 1e6
    if not BRAIN_LITRES[0] <= litres <= BRAIN_LITRES[1]:
        raise VolumeError(f"its brain mask has a volume of {litres:.2f} litres; a brain has 0.5 to 2.5")
    (box,) = ndimage.find_objects(inside.astype(np.int8))
    middle = np.array([(s.start + s.stop - 1) / 2 for s in box])
    return mask.affine[:3, :3] @ middle + mask.affine[:3, 3]


def brain_range(
    volume: Volume, centre_mm: np.ndarray, mask: Volume | None, percentiles
) -> tuple[float, float]:
    """Return two percentiles of the intensity within the brain mask, or within an ellipsoid about the centre.

    `mask` is in the scan's space, on any grid.
    """
    step = np.maximum(1, np.round(1.5 / volume.spacing_mm)).astype(int)
    coarse = volume.voxels[tuple(slice(None, None, n) for n in step)]
    affine = volume.affine @ np.diag([*step, 1])
    if mask is None:
        axes = np.indices(coarse.shape, sparse=True)
        points = [sum(affine[i, j] * axes[j] for j in range(3)) + affine[i, 3] for i in range(3)]
        offset = sum(((p - c) / r) ** 2 for p, c, r in zip(points, centre_mm, BRAIN_RADII_MM, strict=True))
        inside = offset < 1
    else:
        inside = _sample(mask, affine, coarse.shape, 0.0) > 0.5
    if np.count_nonzero(inside) < 1000:
        raise VolumeError("the brain is outside the scan")
    low, high = np.percentile(coarse[inside], percentiles)
    if not high > low:
        raise VolumeError("the brain has no contrast: its percentiles are equal")
    return float(low), float(high)


def extract_slices(
    volume: Volume,
    settings: SlicingSettings,
    centre_mm: np.ndarray,  # (3,), the centre of the slices
    to_scan: np.ndarray | None = None,  # (4, 4), from the slices' space to the scan's, mm; None: the same
    outside: float = 0.0,  # intensity beyond the scan
) -> np.ndarray:
    """Sample slices (S, H, W) float32, in the scan's units, at their positions along the normal."""
    grid, fine, thick = _fine_grid(volume, settings, centre_mm)
    size, slices = settings.image_size, []
    for position in settings.positions_mm:
        placed = grid.copy()
        placed[PLANES[settings.plane][0], 3] += position
        placed = placed if to_scan is None else to_scan @ placed
        values = _sample(volume, placed, (thick, size * fine, size * fine), outside)
        slices.append(values.reshape(thick, size, fine, size, fine).mean((0, 2, 4), dtype=np.float32))
    return np.stack(slices)


def snap_to_voxels(volume: Volume, settings: SlicingSettings, centre_mm: np.ndarray) -> np.ndarray:
    """Move the centre by under half a voxel, so that 1 mm voxels at 1 mm pixels are not interpolated."""
    start = _fine_grid(volume, settings, centre_mm)[0][:3, 3]
    start[PLANES[settings.plane][0]] += settings.positions_mm[0]
    voxel = np.linalg.solve(volume.affine[:3, :3], start - volume.affine[:3, 3])
    voxel = np.round(voxel, 6)  # the same decision whichever way the file stored its axes
    return centre_mm + volume.affine[:3, :3] @ (np.floor(voxel + 0.5) - voxel)


def _fine_grid(
    volume: Volume, settings: SlicingSettings, centre_mm: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Return (4, 4) from (plane, row, column) of a fine grid to mm, and points per pixel side and thickness.

    The grid is that of a slice at position 0, and fine enough to include every voxel within a pixel's box.
    """
    fine, thick = (
        max(1, int(np.ceil(box_mm / volume.spacing_mm.min() - 0.34)))
        for box_mm in (settings.pixel_mm, THICKNESS_MM)
    )
    across, down, right = PLANES[settings.plane]
    side, step, step_across = settings.image_size * fine, settings.pixel_mm / fine, THICKNESS_MM / thick
    grid = np.zeros((4, 4))
    grid[across, 0] = step_across
    grid[down, 1] = grid[right, 2] = -step
    grid[:3, 3] = centre_mm
    grid[across, 3] -= (thick - 1) / 2 * step_across
    grid[[down, right], 3] += (side - 1) / 2 * step
    grid[3, 3] = 1
    return grid, fine, thick


def _sample(volume: Volume, grid: np.ndarray, shape: tuple[int, ...], outside: float) -> np.ndarray:
    """Trilinear values, float32 `shape`, of a volume at the points mm that `grid` (4, 4) maps indices to."""
    to_voxel = np.linalg.inv(volume.affine) @ grid
    to_voxel = np.round(to_voxel, 9)  # the last bits depend on how the axes were stored
    matrix, shift = to_voxel[:3, :3], to_voxel[:3, 3]
    if np.count_nonzero(matrix) == 3:
        return _sample_along_axes(volume.voxels, matrix, shift, shape, outside)
    return ndimage.affine_transform(volume.voxels, matrix, shift, shape, np.float32, order=1, cval=outside)


def _sample_along_axes(
    voxels: np.ndarray, matrix: np.ndarray, shift: np.ndarray, shape: tuple[int, ...], outside: float
) -> np.ndarray:
    """The same for a grid whose axes are parallel to the volume's, axis by axis: a tenth of the time."""
    along = np.argmax(matrix != 0, axis=0)  # axes of the volume in the order of the grid's
    values, within = voxels.transpose(along), []
    for axis, source in enumerate(along):
        place = matrix[source, axis] * np.arange(shape[axis]) + shift[source]
        last = values.shape[axis] - 1
        below = np.clip(np.floor(place).astype(int), 0, last)
        weight = np.expand_dims((place - below).astype(np.float32), [a for a in range(3) if a != axis])
        before = (slice(None),) * axis  # no np.take, which copies the volume to C order first
        low, high = values[(*before, below)], values[(*before, np.minimum(below + 1, last))]
        values = low + (high - low) * weight
        within.append((place >= 0) & (place <= last))
    return np.where(within[0][:, None, None] & within[1][:, None] & within[2], values, np.float32(outside))
