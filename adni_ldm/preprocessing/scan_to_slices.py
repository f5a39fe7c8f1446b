"""One scan to slices: the steps from its files to grey values."""

import glob
from pathlib import Path

import numpy as np

from adni_ldm.preprocessing.registration import Template, register
from adni_ldm.preprocessing.slicing import (
    CENTRE_MM,
    SlicingSettings,
    brain_range,
    centre_of_mask,
    extract_slices,
    find_brain,
    snap_to_voxels,
)
from adni_ldm.preprocessing.volumes import NIFTI_SUFFIXES, Volume, VolumeError, read_any_volume, read_volume


def slice_scan(path: str | Path, settings: SlicingSettings, template: Template | None = None) -> np.ndarray:
    """Make slices (S, H, W), uint8 or uint16, of a NIfTI file or a DICOM folder.

    With a mask, 0 marks what is outside the brain, and only that. Slices are in the order of their positions:
    from the centre of the brain, or, where registered, from x = 0, y = -17, z = 4 mm of MNI152. Raises
    VolumeError if the scan cannot be used.
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

    centre = snap_to_voxels(volume, settings, centre) if to_scan is None else CENTRE_MM
    slices = extract_slices(volume, settings, centre, to_scan, outside=low)
    peak = 2**settings.bits - 1
    grey = np.rint(np.clip((slices - low) / (high - low), 0, 1) * peak)
    if mask is not None:
        inside = extract_slices(mask, settings, centre, to_scan) > 0.5
        grey = np.where(inside, np.maximum(grey, 1), 0)
    if not (filled := grey.any((1, 2))).all():
        position = settings.positions_mm[np.argmin(filled)]
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
