"""One scan to slices: the settings, and the steps from its files to grey values."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path

import numpy as np

from adni_ldm.errors import UserError
from adni_ldm.preprocessing.registration import Template, register
from adni_ldm.preprocessing.slicing import (
    CENTRE_MM,
    PLANES,
    SliceGrid,
    brain_range,
    centre_of_mask,
    evenly_about_zero,
    extract_slices,
    find_brain,
    snap_to_voxels,
)
from adni_ldm.preprocessing.volumes import NIFTI_SUFFIXES, Volume, VolumeError, read_any_volume, read_volume


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
        for name, low, high in (("slices", 1, 100), ("image_size", 16, 2048), ("bits", 8, 16)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name}={getattr(self, name)}: choose {low} to {high}")
        if self.plane not in PLANES or self.register not in ("none", "mni") or self.bits not in (8, 16):
            raise UserError(f"plane={self.plane}, register={self.register}, bits={self.bits}: see --help")
        if not (0.1 <= self.spacing_mm <= 50 and 50 <= self.field_of_view_mm <= 500):
            raise UserError(
                f"spacing_mm={self.spacing_mm}, field_of_view_mm={self.field_of_view_mm}: "
                "choose 0.1 to 50 and 50 to 500"
            )
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
    def slices_mm(self) -> tuple[float, ...]:
        """Positions along the normal of the plane: from the centre of the brain, or in MNI152."""
        origin = CENTRE_MM[PLANES[self.plane][0]] if self.register == "mni" else 0.0
        return tuple(float(origin + position) for position in self.grid.positions_mm)

    @property
    def grid(self) -> SliceGrid:
        positions = evenly_about_zero(self.slices, self.spacing_mm)
        return SliceGrid(self.plane, positions, self.image_size, self.field_of_view_mm)


def slice_scan(path: str | Path, settings: SlicingSettings, template: Template | None = None) -> np.ndarray:
    """Make slices (S, H, W), uint8 or uint16, of a NIfTI file or a DICOM folder.

    With a mask, 0 marks what is outside the brain, and only that. Slices are in the order of their positions:
    from the centre of the brain, or, where registered, from x = 0, y = -17, z = 4 mm of MNI152.

    Raises:
        VolumeError: the scan cannot be used.
    """
    volume = read_volume(path)
    mask, to_scan = None, None
    if settings.mask_files:
        mask = read_any_volume(find_mask(Path(path), settings.mask_files))
    centre = find_brain(volume) if mask is None else centre_of_mask(mask)
    if settings.needs_template:
        from_template = register(volume, centre, template)
        if settings.brain_mask == "mni":
            mask = Volume(template.mask.voxels, from_template @ template.mask.affine)
        to_scan = from_template if settings.register == "mni" else None
        centre = from_template[:3, :3] @ CENTRE_MM + from_template[:3, 3]
    low, high = brain_range(volume, centre, mask, settings.percentiles)

    grid = settings.grid
    centre = snap_to_voxels(volume, grid, centre) if to_scan is None else CENTRE_MM
    slices = extract_slices(volume, grid, centre, to_scan, outside=low)
    peak = 2**settings.bits - 1
    grey = np.rint(np.clip((slices - low) / (high - low), 0, 1) * peak)
    if mask is not None:
        inside = extract_slices(mask, grid, centre, to_scan) > 0.5
        grey = np.where(inside, np.maximum(grey, 1), 0)
    if not (filled := grey.any((1, 2))).all():
        position = grid.positions_mm[int(np.argmin(filled))]
        raise VolumeError(f"the slice at {position:g} mm shows no brain; reduce --slices or --spacing_mm")
    return grey.astype(np.uint8 if settings.bits == 8 else np.uint16)


def find_mask(path: Path, pattern: str) -> Path:
    """Find the one mask beside a scan (or in its DICOM folder) that matches. Raises VolumeError."""
    name = path.name
    for suffix in reversed(NIFTI_SUFFIXES):
        name = name.removesuffix(suffix)
    folder = path if path.is_dir() else path.parent
    found = sorted(p for p in folder.glob(pattern.replace("{name}", glob.escape(name))) if p != path)
    if len(found) != 1:
        listed = " (" + ", ".join(p.name for p in found[:3]) + ")" if found else ""
        raise VolumeError(f"{len(found) or 'no'} brain masks {pattern} beside it{listed}")
    return found[0]


def mask_names(settings: SlicingSettings) -> list[str]:
    """Glob patterns of files that are masks, not scans."""
    return [Path(settings.mask_files.replace("{name}", "*")).name] if settings.mask_files else []
