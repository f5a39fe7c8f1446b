"""Read one 3-D scan: NIfTI (.nii, .nii.gz) or a folder with a DICOM series, checked and reoriented to RAS.

nibabel and pydicom are called directly. MONAI's NibabelReader adds nothing to nibabel, and importing monai
costs each worker process 8 s and 0.9 GB. MONAI's PydicomReader sorts by InstanceNumber, whose direction
differs between scanners, and only warns where slices are missing or differ in size; here positions decide.

    volume = read_volume("ADNI/002_S_xxxx/MPRAGE/2006-05-02/I14xxx")   # a folder: DICOM; a file: NIfTI
    volume.voxels, volume.affine                                      # float32 (X, Y, Z); voxel -> RAS mm
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

NIFTI_SUFFIXES = (".nii", ".nii.gz")
EXTENT_MM = (100.0, 420.0)  # a head along any axis; less is a slab, more is a body or a wrong unit
THICKEST_MM = 6.0
FEWEST_VOXELS = 20  # along an axis; a localizer has 3 to 15 slices
MOST_VOXELS = 1024**3 // 2
MOST_EXTENSIONS = 1 << 24  # bytes of a NIfTI file before and behind its voxels


class VolumeError(ValueError):
    """A scan that cannot be used; the message gives the reason in one line, without the path."""


@dataclass(frozen=True)
class Volume:
    """One 3-D scan.

    `voxels` float32 (X, Y, Z), in the scanner's units, its axes closest to right, anterior and superior;
    `affine` (4, 4) maps voxel indices to mm, RAS. It keeps the rotation of an oblique scan.
    """

    voxels: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Sides of a voxel (3,), mm."""
        return nibabel.affines.voxel_sizes(self.affine)


def read_volume(path: str | Path) -> Volume:
    """Read a NIfTI file or a DICOM folder.

    Raises VolumeError for what cannot be a whole head, or has no usable intensities.
    """
    volume = read_any_volume(path)
    shape, spacing = np.array(volume.voxels.shape), volume.spacing_mm
    extent = shape * spacing
    size = " x ".join(f"{n}" for n in shape) + " voxels of " + " x ".join(f"{s:.2g}" for s in spacing) + " mm"
    if shape.min() < FEWEST_VOXELS or spacing.max() > THICKEST_MM:
        raise VolumeError(f"{size}: too few or too thick slices, perhaps a localizer")
    if extent.min() < EXTENT_MM[0] or extent.max() > EXTENT_MM[1]:
        low, high = EXTENT_MM
        raise VolumeError(f"{size}: not a whole head, which measures {low:.0f} to {high:.0f} mm")
    low, high = volume.voxels.min(), volume.voxels.max()
    if not np.isfinite([low, high]).all():  # min and max propagate NaN
        bad = np.count_nonzero(~np.isfinite(volume.voxels))
        raise VolumeError(f"{bad} of {volume.voxels.size} voxels are NaN or infinite")
    if low == high:
        raise VolumeError(f"all voxels are {low:g}")
    return volume


def read_any_volume(path: str | Path) -> Volume:
    """Read a 3-D volume of any size and content, such as a mask. Raises VolumeError if it is unreadable."""
    path = Path(path)
    try:
        voxels, affine = _read_dicom(path) if path.is_dir() else _read_nifti(path)
    except VolumeError:
        raise
    except Exception as error:  # of a damaged file, nibabel, pydicom and zlib raise many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise VolumeError(f"cannot be read ({reason[:200]}); copy it again") from error
    valid = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6
    # NaN where an axis has no direction of its own, beside one that is longer by many orders of magnitude
    orientation = nibabel.io_orientation(affine) if valid else np.full((3, 2), np.nan)
    if not np.isfinite(orientation).all():
        raise VolumeError("its header has no valid affine")
    affine = affine @ nibabel.orientations.inv_ornt_aff(orientation, voxels.shape)
    return Volume(nibabel.apply_orientation(voxels, orientation), affine)


# ------------------------------------------------------------------------- NIfTI


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels float32 (X, Y, Z) with scl_slope applied, and their affine, as stored."""
    if not path.is_file():  # reading a pipe would block
        raise VolumeError("not a file")
    with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
        start = file.read(540)  # bytes of the longer of the two headers
        second = start[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c")
        kind = nibabel.Nifti2Image if second else nibabel.Nifti1Image
        header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
        if header.get_data_dtype().kind not in "iuf":
            raise VolumeError(f"voxels of type {header.get_data_dtype()}, which are not intensities")
        _check_shape(header.get_data_shape())
        # A small .gz may unpack to any size: read no more than the header announces.
        size = int(np.prod(header.get_data_shape())) * header.get_data_dtype().itemsize
        content = start + file.read(size + MOST_EXTENSIONS)
        if file.read(1):  # at the end of the file gzip verifies its checksum
            raise VolumeError("far longer than its header announces")
    image = kind.from_bytes(content)
    if not image.header["sform_code"] and not image.header["qform_code"]:
        raise VolumeError("its header has no orientation (sform_code and qform_code are 0)")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is rejected later
        voxels = image.get_fdata(dtype=np.float32, caching="unchanged")
    return voxels.reshape(image.shape[:3]), image.affine.astype(np.float64)


def _check_shape(shape: tuple[int, ...]) -> None:
    listed = " x ".join(map(str, shape))
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise VolumeError(f"{listed} voxels: {len(shape)}-D, where one 3-D volume is expected")
    if min(shape) < 1:  # with a negative size, a file would be read to its end
        raise VolumeError(f"{listed} voxels: every dimension must be at least 1")
    if np.prod(shape, dtype=float) > MOST_VOXELS:
        raise VolumeError(f"{listed} voxels: too large to be a scan of a head")


# ------------------------------------------------------------------------- DICOM


def is_dicom(path: Path) -> bool:
    """Whether a path is a file with the DICOM preamble."""
    if not path.is_file():  # reading a pipe would block
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels float32 (columns, rows, slices) in rescaled units, and their affine, RAS mm.

    Slices are sorted by ImagePositionPatient (DICOM part 3, C.7.6.2), not by file name or instance number.
    """
    import pydicom  # 0.2 s, which NIfTI does without

    files = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and is_dicom(path)]
    _check_files(files)
    slices = [pydicom.dcmread(path) for path in files]
    slices = [s for s in slices if "PixelData" in s]  # the folder may hold a DICOMDIR or a report
    if not slices:
        raise VolumeError("no DICOM images in the folder")
    _check_series(slices)
    first = slices[0]
    _check_shape((first.Columns, first.Rows, len(slices)))  # compressed files may announce any size
    across, down = np.array(first.ImageOrientationPatient, float).reshape(2, 3)  # unit vectors, LPS
    normal = np.cross(across, down)
    slices.sort(key=lambda s: float(normal @ np.array(s.ImagePositionPatient, float)))
    origins = np.array([s.ImagePositionPatient for s in slices], float)  # (K, 3)
    step = _even_step(origins, normal)

    row_mm, column_mm = map(float, first.PixelSpacing)  # between rows, between columns
    affine = np.eye(4)
    affine[:3] = np.stack([across * column_mm, down * row_mm, step, origins[0]], axis=1)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # LPS to RAS
    voxels = np.empty((len(slices), first.Rows, first.Columns), np.float32)
    for plane, dataset in zip(voxels, slices, strict=True):
        plane[:] = dataset.pixel_array
        plane *= float(dataset.get("RescaleSlope", 1))
        plane += float(dataset.get("RescaleIntercept", 0))
    return voxels.T, affine


def _check_files(files: list[Path]) -> None:
    """Raise VolumeError for files that would exhaust the memory, before any is read whole."""
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if sum(path.stat().st_size for path in files) > 8 * MOST_VOXELS:
        raise VolumeError(f"{len(files)} DICOM files, too large to be a scan of a head")
    for path in files:
        if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
            raise VolumeError("deflated DICOM files, which may unpack to any size; convert them with dcmconv")


def _check_series(slices: list) -> None:
    """Raise VolumeError unless all slices belong to one series of parallel, single-frame, grey images."""
    if count := len({s.get("SeriesInstanceUID") for s in slices}) - 1:
        raise VolumeError(f"{count + 1} DICOM series in one folder; give each a folder of its own")
    words = " ".join([*slices[0].get("ImageType", []), str(slices[0].get("SeriesDescription", ""))]).lower()
    if any(word in words for word in ("localizer", "scout", "survey")):
        raise VolumeError(f"a localizer, by its description ({words})")
    if "mosaic" in words.split() or any(int(s.get("NumberOfFrames") or 1) > 1 for s in slices):
        raise VolumeError("several frames in one DICOM file; convert it to NIfTI with dcm2niix")
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        if any(s.get(name) is None for s in slices):
            raise VolumeError(f"a DICOM file has no {name}, so it is not a slice of a volume")
    if any(s.get("SamplesPerPixel", 1) != 1 for s in slices):
        raise VolumeError("colour DICOM images, which are not a scan")
    if len({(s.Rows, s.Columns) for s in slices}) > 1 or _spread(slices, "PixelSpacing") > 1e-3:
        raise VolumeError("slices of different sizes in one series")
    if _spread(slices, "ImageOrientationPatient") > 1e-3:
        raise VolumeError("slices in different directions: a localizer")


def _spread(slices: list, name: str) -> float:
    return float(np.ptp(np.array([s.get(name) for s in slices], float), axis=0).max())


def _even_step(origins: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Return the step (3,), mm, between slices. Raises VolumeError for missing or repeated slices."""
    if len(origins) < FEWEST_VOXELS:
        raise VolumeError(f"{len(origins)} DICOM slices: a localizer, or an incomplete series")
    gaps = np.diff(origins @ normal)
    usual = float(np.median(gaps))
    if gaps.min() < 1e-3:
        raise VolumeError("DICOM slices at the same position: several echoes or time points, not one volume")
    if (odd := np.abs(gaps - usual) > 0.1 * usual).any():
        place = origins[np.argmax(odd)] @ normal
        raise VolumeError(
            f"DICOM slices are missing after {place:.1f} mm ({len(origins)} slices of {usual:.2f} mm)"
        )
    return (origins[-1] - origins[0]) / (len(origins) - 1)
