"""Scans in any storage order give the same upright slices; what is not a head is refused."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.testing import data_path as NIBABEL_DATA
from volume_files import head, reoriented, template_head, write_dicom

from adni_ldm.preprocessing.registration import load_template, register
from adni_ldm.preprocessing.scan_to_slices import SlicingSettings, slice_scan
from adni_ldm.preprocessing.slicing import CENTRE_MM, PLANES
from adni_ldm.preprocessing.volumes import Volume, VolumeError, read_any_volume, read_volume

SMALL = SlicingSettings(slices=3, spacing_mm=10.0, image_size=96, field_of_view_mm=208.0)


def save(image, path: Path) -> Path:
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def upright(tmp_path_factory) -> np.ndarray:
    """The slices of head 0, stored as RAS."""
    return slice_scan(save(head(), tmp_path_factory.mktemp("ras") / "head.nii"), SMALL)


@pytest.mark.parametrize("codes", ["LPI", "LIA", "PIR", "ASL", "SAR", "IRP", "LAS", "PSR", "RSA"])
def test_every_orientation_gives_the_same_pictures(upright, tmp_path, codes):
    image = reoriented(head(), codes)
    assert "".join(nibabel.aff2axcodes(image.affine)) == codes
    pictures = slice_scan(save(image, tmp_path / "head.nii.gz"), SMALL)
    assert np.array_equal(pictures, upright)


def test_sagittal_pictures_have_anterior_left_and_superior_up(upright):
    """As in the phantom's: under the frontal lobe is air, cerebellum and brain stem lie behind and low."""
    low = upright[1][int(96 * 0.68) : int(96 * 0.8)].astype(float)
    assert low[:, 48:].sum() > 3 * low[:, :48].sum()
    assert upright[1][:48].sum() > upright[1][48:].sum()


@pytest.mark.parametrize("plane", PLANES)
def test_layout_of_each_plane(tmp_path, plane):
    """A ball 12 mm right, 28 anterior, 45 superior: right is shown left; in sagittal slices anterior is."""
    voxels, affine = template_head()
    offset = np.array([12, 28, 45])
    mm = np.moveaxis(np.indices(voxels.shape), 0, -1) @ affine[:3, :3] + affine[:3, 3]
    ball = np.linalg.norm(mm - (CENTRE_MM + offset), axis=-1) < 9
    image = nibabel.Nifti1Image(np.where(ball, 3000, voxels).astype(np.int16), affine)
    across, down, right = {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}[plane]
    method = SlicingSettings(
        plane=plane, slices=3, spacing_mm=float(offset[across]), image_size=104, field_of_view_mm=208.0
    )
    pictures = slice_scan(save(image, tmp_path / "head.nii"), method)
    white = pictures == 255
    assert white[2].sum() > 3 * white[0].sum()
    rows, columns = np.nonzero(white[2])
    assert np.median(rows) == pytest.approx(52 - offset[down] / 2, abs=4)  # pixels of 2 mm
    assert np.median(columns) == pytest.approx(52 - offset[right] / 2, abs=4)


def test_one_mm_voxels_are_not_interpolated(tmp_path):
    """A 1 mm scan seen at 1 mm: its own values, only scaled, so checkerboards survive."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(100, 1100, (120, 150, 140)).astype(np.int16)
    affine = np.eye(4)
    affine[:3, 3] = [-60.3, -75.8, -70.1]
    method = SlicingSettings(slices=2, spacing_mm=2.0, image_size=64, field_of_view_mm=64.0, bits=16)
    pictures = slice_scan(save(nibabel.Nifti1Image(voxels, affine), tmp_path / "noise.nii"), method)
    assert pictures.dtype == np.uint16
    assert pictures.std() > 0.99 * voxels.std() / 995 * 65535  # linear interpolation would halve it


@pytest.mark.parametrize("stride", [(1, 1, 2), (2, 1, 1), (1, 2, 1)])
def test_anisotropic_voxels_keep_their_shape(upright, tmp_path, stride):
    image = head()
    thick = nibabel.Nifti1Image(
        np.asarray(image.dataobj)[tuple(slice(None, None, s) for s in stride)],
        image.affine @ np.diag([*stride, 1]),
    )
    pictures = slice_scan(save(thick, tmp_path / "head.nii"), SMALL)
    shown, truth = pictures[1] > 60, upright[1] > 60
    overlap = 2 * (shown & truth).sum() / (shown.sum() + truth.sum())
    assert overlap > 0.95
    assert np.corrcoef(pictures[1].ravel(), upright[1].ravel())[0, 1] > 0.95


@pytest.mark.parametrize("dtype", ["uint8", ">i2", "<u2", "float32", ">f4", "float64"])
def test_types_of_voxels_give_the_same_pictures(upright, tmp_path, dtype):
    image = head()
    voxels = np.asarray(image.dataobj)
    voxels = (voxels / 5 if dtype == "uint8" else voxels).astype(dtype)
    header = nibabel.Nifti1Header(endianness=">" if dtype[0] == ">" else "<")
    stored = nibabel.Nifti1Image(voxels, image.affine, header, dtype=np.dtype(dtype))
    path = save(stored, tmp_path / "head.nii.gz")
    assert nibabel.load(path).get_data_dtype() == np.dtype(dtype)
    pictures = slice_scan(path, SMALL).astype(int)
    assert np.abs(pictures - upright).max() <= (4 if dtype == "uint8" else 1)


def test_scl_slope_and_inter_are_applied(upright, tmp_path):
    image = head()
    voxels = np.asarray(image.dataobj)
    stored = nibabel.Nifti1Image((700 - voxels) * 2, image.affine)  # dark on disk is white
    stored.header.set_slope_inter(-0.5, 700)
    path = save(stored, tmp_path / "head.nii")
    assert np.array_equal(read_volume(path).voxels, voxels)
    assert np.array_equal(slice_scan(path, SMALL), upright)


def test_nifti_2_reads_as_nifti_1(upright, tmp_path):
    image = head()
    path = save(nibabel.Nifti2Image(np.asarray(image.dataobj), image.affine), tmp_path / "head.nii.gz")
    assert np.array_equal(slice_scan(path, SMALL), upright)


def test_dicom_is_put_in_order_by_position(upright, tmp_path):
    folder = write_dicom(head(), tmp_path / "series")
    assert len(list(folder.iterdir())) == head().shape[0]
    assert np.array_equal(slice_scan(folder, SMALL), upright)


def test_dicom_rescale_is_applied_slice_by_slice(upright, tmp_path):
    half = nibabel.Nifti1Image(np.asarray(head().dataobj) // 2 * 2, head().affine)
    want = slice_scan(save(half, tmp_path / "half.nii"), SMALL)
    stored = nibabel.Nifti1Image(np.asarray(half.dataobj) // 2, half.affine)
    folder = write_dicom(stored, tmp_path / "series", RescaleSlope=2, RescaleIntercept=-50)
    assert np.array_equal(slice_scan(folder, SMALL), want)


def _remove_one(folder: Path) -> None:
    (folder / "IM0030.dcm").unlink()


@pytest.mark.parametrize(
    ("changes", "damage", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, None, "a localizer"),
        (
            {"ImageOrientationPatient": lambda k: [0, 1, 0, 0, 0, -1] if k % 2 else [1, 0, 0, 0, 1, 0]},
            None,
            "different directions: a localizer",
        ),
        ({"ImagePositionPatient": [0, 0, 0]}, None, "at the same position"),
        ({"SeriesInstanceUID": lambda k: f"1.2.{k % 2 + 1}"}, None, "2 DICOM series"),
        ({"NumberOfFrames": 4}, None, "several frames"),
        ({"PixelData": b"\0" * 100}, None, "cannot be read"),
        ({}, _remove_one, "slices are missing"),
    ],
)
def test_dicom_that_is_no_volume_is_refused(tmp_path, changes, damage, reason):
    folder = write_dicom(head(), tmp_path / "series", **changes)
    if damage:
        damage(folder)
    with pytest.raises(VolumeError, match=reason):
        read_volume(folder)


def _image(voxels, affine=None):
    return nibabel.Nifti1Image(voxels, template_head()[1] if affine is None else affine)


def _with_nan() -> np.ndarray:
    voxels = template_head()[0].astype(np.float32)
    voxels[3, 4, 5] = np.nan
    return voxels


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _image(np.stack([template_head()[0]] * 2, axis=-1)), "4-D"),
        (lambda: _image(template_head()[0][:, :, 0]), "2-D"),
        (lambda: _image(template_head()[0][:, 50:55]), "localizer"),
        (lambda: _image(template_head()[0][::5], np.diag([10, 2, 2, 1.0])), "localizer"),
        (lambda: _image(template_head()[0][20:50]), "not a whole head"),
        (lambda: _image(_with_nan()), "1 of .* voxels are NaN"),
        (lambda: _image(np.full_like(template_head()[0], 7)), "all voxels are 7"),
        (lambda: _image(template_head()[0].astype(np.complex64)), "complex64"),
    ],
)
def test_nifti_that_is_no_head_is_refused(tmp_path, make, reason):
    with pytest.raises(VolumeError, match=reason):
        read_volume(save(make(), tmp_path / "scan.nii.gz"))


def test_nifti_without_an_orientation_is_refused(tmp_path):
    image = head()
    image.set_sform(image.affine, code=0)
    image.set_qform(image.affine, code=0)
    with pytest.raises(VolumeError, match="no orientation"):
        read_volume(save(image, tmp_path / "scan.nii"))


@pytest.mark.parametrize("row", [[0, 0, 0, 0], [1e30, 0, 2, 0]])
def test_a_flat_affine_is_refused(tmp_path, row):
    """The second one has a determinant, and no orientation within the precision of a float."""
    path = save(head(), tmp_path / "scan.nii")
    content = bytearray(path.read_bytes())
    content[312:328] = np.array(row, "<f4").tobytes()  # srow_z
    path.write_bytes(content)
    with pytest.raises(VolumeError, match="no valid affine"):
        read_volume(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_files_are_refused(tmp_path, suffix):
    path = save(head(), tmp_path / f"scan{suffix}")
    content = path.read_bytes()
    for kept in (0, 100, len(content) // 2, len(content) - 4):  # the last cuts into the checksum
        path.write_bytes(content[:kept])
        with pytest.raises(VolumeError, match="cannot be read"):
            read_volume(path)


def test_a_flipped_bit_fails_the_checksum(tmp_path):
    path = tmp_path / "scan.nii.gz"
    plain = bytearray(save(head(), tmp_path / "scan.nii").read_bytes())
    packed = bytearray(gzip.compress(bytes(plain), compresslevel=0))  # stored, so that any bits unpack
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed)
    with pytest.raises(VolumeError, match="cannot be read.*CRC"):
        read_volume(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("anatomical.nii", "not a whole head"),  # 66 x 82 x 50 mm of one, big-endian
        ("functional.nii", "17 x 21 x 3 x 20 voxels: 4-D"),
        ("example4d.nii.gz", "4-D"),
        ("example_nifti2.nii.gz", "4-D"),
        ("resampled_anat_moved.nii", "localizer"),
        ("standard.nii.gz", "localizer"),
    ],
)
def test_files_of_nibabels_own_are_read_and_refused_for_what_they_are(name, reason):
    with pytest.raises(VolumeError, match=reason):
        read_volume(Path(NIBABEL_DATA) / name)


def test_a_real_file_reads_as_nibabel_reads_it():
    """Big-endian, LAS: written by SPM, not by us."""
    path = Path(NIBABEL_DATA) / "anatomical.nii"
    volume, image = read_any_volume(path), nibabel.as_closest_canonical(nibabel.load(path))
    assert np.array_equal(volume.voxels, image.get_fdata(dtype=np.float32))
    assert np.allclose(volume.affine, image.affine)


def test_real_dicom_of_nibabels_own_is_refused(tmp_path):
    folder = Path(NIBABEL_DATA).parents[1] / "nicom" / "tests" / "data"
    packed = (folder / "philips_mprage.dcm.gz").read_bytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mprage.dcm").write_bytes(gzip.decompress(packed))
    with pytest.raises(VolumeError, match="several frames"):
        read_volume(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("0.dcm", "1.dcm"):
        (tmp_path / "b" / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(VolumeError, match="several frames"):  # Siemens' mosaics
        read_volume(tmp_path / "b")


def test_the_real_template_file_is_cut_in_its_middle():
    """A real NIfTI of 1 mm, uint8: the mid-sagittal slice shows the whole brain, centred."""
    nilearn = pytest.importorskip("nilearn")
    folder = Path(nilearn.__file__).parent / "datasets" / "data"
    path = folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    (picture,) = slice_scan(path, SlicingSettings(slices=1))
    rows, columns = np.nonzero(picture > 40)
    assert abs((rows.min() + rows.max()) / 2 - 127.5) < 12
    assert abs((columns.min() + columns.max()) / 2 - 127.5) < 12
    assert 130 < np.ptp(rows) < 175 and 150 < np.ptp(columns) < 195


def test_a_mask_beside_the_scan_blackens_the_rest(tmp_path):
    image = head()
    path = save(image, tmp_path / "sub[1].nii.gz")
    brain = np.asarray(image.dataobj) > 0
    brain[: len(brain) // 2] = False  # the right half alone
    save(nibabel.Nifti1Image(brain.astype(np.uint8), image.affine), tmp_path / "sub[1]_mask.nii.gz")
    method = SlicingSettings(
        plane="coronal", slices=1, image_size=96, field_of_view_mm=208.0, brain_mask="{name}_mask.nii.gz"
    )
    (picture,) = slice_scan(path, method)
    rows, columns = np.nonzero(picture)
    assert 25 < np.ptp(columns) * 208 / 96 < 85  # half a brain
    with pytest.raises(VolumeError, match="no brain masks"):
        slice_scan(save(image, tmp_path / "other.nii.gz"), method)


def test_registration_finds_a_known_pose(tmp_path):
    """A head turned by 15 degrees, moved by 40 mm and 5 % smaller comes back to 3 mm, the same every time."""
    template = load_template()
    voxels, affine = template_head()
    turn, size = np.radians(15), 0.95
    pose = np.eye(4)  # from the template's mm to the scanner's
    pose[1:3, 1:3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    pose[:3, :3] *= size
    pose[:3, 3] = [15, 30, -20]
    scan = Volume(voxels.astype(np.float32), pose @ affine)
    start = pose[:3, :3] @ CENTRE_MM + pose[:3, 3] + [4, -8, 12]
    found = register(scan, start, template)
    corners = np.array([[x, y, z, 1] for x in (-50, 50) for y in (-80, 50) for z in (-30, 60)], float).T
    error = np.linalg.norm(((found - pose) @ corners)[:3], axis=0)
    assert error.max() < 3
    assert np.array_equal(found, register(scan, start, template))


def test_registration_refuses_what_is_no_head():
    template = load_template()
    noise = np.random.default_rng(0).random((90, 90, 90), np.float32)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    with pytest.raises(VolumeError, match="not registered"):
        register(Volume(noise, affine), np.array([90.0, 90, 90]), template)


def test_mni_mask_leaves_the_brain_on_black(tmp_path):
    """Air brightened to tissue, so that only the mask can make it black."""
    image = head()
    voxels = np.asarray(image.dataobj).copy()
    voxels[voxels == 0] = 150
    path = save(nibabel.Nifti1Image(voxels, image.affine), tmp_path / "head.nii")
    method = SlicingSettings(
        slices=1, image_size=96, field_of_view_mm=208.0, register="mni", brain_mask="mni"
    )
    (picture,) = slice_scan(path, method, load_template())
    assert not picture[:8].any() and not picture[:, :3].any() and not picture[-8:].any()
    assert 0.3 < (picture > 0).mean() < 0.6
