"""Heads for the tests of scans: the template, coarse and bent a little, as NIfTI and DICOM files."""

from __future__ import annotations

import functools
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform

from adni_ldm.preprocessing.phantom_atlas import load_atlas


@functools.cache
def template_head() -> tuple[np.ndarray, np.ndarray]:
    """The template's brain at 2 mm, int16 0 to 1000, RAS, on air of 20 mm; and its affine."""
    atlas = load_atlas()
    coarse = atlas.intensity[::2, ::2, ::2]
    voxels = np.pad((coarse * 1000).astype(np.int16), 10)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = atlas.origin_mm - 20.0
    return voxels, affine


def head(seed: int = 0) -> nibabel.Nifti1Image:
    """A head unlike others: the template with a bias field and noise, both from `seed`."""
    voxels, affine = template_head()
    rng = np.random.default_rng(seed)
    slope = 1 + 0.2 * rng.uniform(-1, 1) * np.linspace(-1, 1, voxels.shape[1])[:, None]
    noisy = voxels * slope + rng.normal(0, 15, voxels.shape)
    return nibabel.Nifti1Image(np.where(voxels > 0, np.maximum(noisy, 1), 0).astype(np.int16), affine)


def reoriented(image: nibabel.Nifti1Image, codes: str) -> nibabel.Nifti1Image:
    """The same head with its voxels stored along other axes: RAS, LPI, PIR ..."""
    change = ornt_transform(nibabel.io_orientation(image.affine), axcodes2ornt(codes))
    turned = nibabel.apply_orientation(np.asarray(image.dataobj), change)
    return nibabel.Nifti1Image(np.ascontiguousarray(turned), image.affine @ inv_ornt_aff(change, image.shape))


def write_dicom(image: nibabel.Nifti1Image, folder: Path, seed: int = 0, **changes) -> Path:
    """A sagittal DICOM series of a RAS head, one file a slice, its names and instance numbers shuffled."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    voxels, spacing = np.asarray(image.dataobj), nibabel.affines.voxel_sizes(image.affine)
    order = np.random.default_rng(seed).permutation(len(voxels))
    series = generate_uid(entropy_srcs=[str(folder)])
    for place, number in enumerate(order):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(folder), str(place)])
        one = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        one.Modality, one.SeriesInstanceUID, one.InstanceNumber = "MR", series, int(number) + 1
        one.ImageType, one.SeriesDescription = ["ORIGINAL", "PRIMARY", "M"], "MPRAGE"
        # Columns run to posterior, rows to inferior; DICOM counts mm to the left and to posterior.
        first = image.affine @ [place, voxels.shape[1] - 1, voxels.shape[2] - 1, 1]
        one.ImagePositionPatient = [-first[0], -first[1], first[2]]
        one.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        one.PixelSpacing = [spacing[2], spacing[1]]
        pixels = np.flip(voxels[place]).T  # (rows, columns)
        one.Rows, one.Columns = pixels.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept = 1, 0
        one.PixelData = np.ascontiguousarray(pixels, dtype="<i2").tobytes()
        for name, value in changes.items():
            setattr(one, name, value(place) if callable(value) else value)
        one.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)
    return folder
