"""How one scan becomes pictures: the settings of it, and the way from files to grey values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from adni_ldm.errors import UserError
from adni_ldm.preprocessing.registration import CENTRE_MM, Template, register
from adni_ldm.preprocessing.slicing import (
    PLANES,
    View,
    brain_range,
    cut_slices,
    even_positions,
    find_brain,
    mask_centre,
    snap_to_voxels,
)
from adni_ldm.preprocessing.volumes import NIFTI_SUFFIXES, Volume, VolumeError, read_any_volume, read_volume


@dataclasses.dataclass(frozen=True)
class Method:
    """How a scan becomes pictures; a store holds those of one method. Raises UserError for what cannot be."""

    plane: str = "sagittal"
    slices: int = 20
    spacing_mm: float = 2.0  # from slice to slice
    image_size: int = 256  # pixels a side
    field_of_view_mm: float = 256.0  # side of a picture
    register: str = "none"  # or mni: the pictures are in the template's space
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

    @property
    def needs_template(self) -> bool:
        return "mni" in (self.register, self.brain_mask)

    @property
    def mask_files(self) -> str | None:
        """The pattern of mask files, where there are any."""
        return None if self.brain_mask in ("none", "mni") else self.brain_mask

    @property
    def slices_mm(self) -> tuple[float, ...]:
        """Where the slices are along the normal of the plane: from the brain's middle, or in MNI152."""
        origin = CENTRE_MM[PLANES[self.plane][0]] if self.register == "mni" else 0.0
        return tuple(float(origin + position) for position in self.view.positions_mm)

    @property
    def view(self) -> View:
        positions = even_positions(self.slices, self.spacing_mm)
        return View(self.plane, positions, self.image_size, self.field_of_view_mm)


def make_pictures(path: str | Path, method: Method, template: Template | None = None) -> np.ndarray:
    """Pictures (S, H, W), uint8 or uint16, of a NIfTI file or a DICOM folder. Raises VolumeError.

    With a mask, 0 is outside the brain and nothing else is. Slices are in the order of the method's
    positions: from the middle of the brain, or, where registered, from x = 0, y = -17, z = 4 mm of MNI152.
    """
    volume = read_volume(path)
    mask, to_scan = None, None
    if method.mask_files:
        mask = read_any_volume(find_mask(Path(path), method.mask_files))
    centre = find_brain(volume) if mask is None else mask_centre(mask)
    if method.needs_template:
        from_template = register(volume, centre, template)
        if method.brain_mask == "mni":
            mask = Volume(template.mask.voxels, from_template @ template.mask.affine)
        to_scan = from_template if method.register == "mni" else None
        centre = from_template[:3, :3] @ CENTRE_MM + from_template[:3, 3]
    low, high = brain_range(volume, centre, mask, method.percentiles)

    view = method.view
    centre = snap_to_voxels(volume, view, centre) if to_scan is None else CENTRE_MM
    pictures = cut_slices(volume, view, centre, to_scan, outside=low)
    peak = 2**method.bits - 1
    grey = np.rint(np.clip((pictures - low) / (high - low), 0, 1) * peak)
    if mask is not None:
        inside = cut_slices(mask, view, centre, to_scan) > 0.5
        grey = np.where(inside, np.maximum(grey, 1), 0)
    if not (shows := grey.any((1, 2))).all():
        place = view.positions_mm[int(np.argmin(shows))]
        raise VolumeError(f"the slice at {place:g} mm shows no brain; take --slices or --spacing_mm smaller")
    return grey.astype(np.uint8 if method.bits == 8 else np.uint16)


def find_mask(path: Path, pattern: str) -> Path:
    """The one file beside a scan (or in its DICOM folder) that the pattern means. Raises VolumeError."""
    name = path.name
    for suffix in reversed(NIFTI_SUFFIXES):
        name = name.removesuffix(suffix)
    folder = path if path.is_dir() else path.parent
    found = sorted(p for p in folder.glob(pattern.replace("{name}", _literal(name))) if p != path)
    if len(found) != 1:
        listed = " (" + ", ".join(p.name for p in found[:3]) + ")" if found else ""
        raise VolumeError(f"{len(found) or 'no'} brain masks {pattern} beside it{listed}")
    return found[0]


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def mask_names(method: Method) -> list[str]:
    """Patterns of names that are masks and no scans."""
    return [Path(method.mask_files.replace("{name}", "*")).name] if method.mask_files else []
