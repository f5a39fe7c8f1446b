"""Untrusted archives, NIfTI and DICOM: paths and links that leave the folder, and decompression bombs."""

import gzip
import hashlib
import io
import os
import random
import stat
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import nibabel
import numpy as np
import pytest
from PIL import Image
from volume_files import head, write_dicom

from adni_ldm.data.archives import open_data_dir
from adni_ldm.data.slices import read_image
from adni_ldm.data.splits import DataError
from adni_ldm.errors import UserError
from adni_ldm.hub.leak_scan import encode_anew
from adni_ldm.preprocessing.study import read_study
from adni_ldm.preprocessing.volumes import VolumeError, read_volume


def zip_of(path, members):
    """A zip with these names and contents; a ZipInfo as name sets the rest."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/AD/1_1.png", b"a picture")
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def link(name):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["../outside.png", "train/../../outside.png", "/outside.png", "..\\outside.png", "C:\\outside.png"],
)
def test_a_zip_that_would_leave_its_folder_is_refused(tmp_path, name):
    path = zip_of(tmp_path / "set.zip", {name: b"x"})
    with pytest.raises(DataError, match="set.zip: .*outside.png would be unpacked outside the folder"):
        open_data_dir(path)


def test_a_zip_with_a_link_is_refused(tmp_path):
    path = zip_of(tmp_path / "set.zip", {link("train/AD/2_1.png"): b"/etc/passwd"})
    with pytest.raises(DataError, match="train/AD/2_1.png is a link"):
        open_data_dir(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = zip_of(tmp_path / "set.zip", {"train/AD/2_1.png": bytes(50_000_000)})
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match="would become 50 MB"):
        open_data_dir(path)


@pytest.mark.parametrize(("zeros", "refused"), [(900_000, False), (1_300_000, True)])
def test_a_zip_may_unpack_to_a_hundred_times_its_size(tmp_path, zeros, refused):
    members = {"train/AD/2_1.png": random.Random(0).randbytes(10_000), "train/AD/3_1.png": bytes(zeros)}
    path = zip_of(tmp_path / "set.zip", members)
    assert ((10_000 + zeros) / path.stat().st_size > 100) is refused
    if refused:
        with pytest.raises(DataError, match="would become"):
            open_data_dir(path)
    else:
        assert open_data_dir(path).name == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("side", "message"), [(4097, "too many for a slice"), (4096, "truncated")])
def test_the_size_of_a_picture_is_checked_by_its_header(tmp_path, side, message):
    """The pixels cannot be decoded."""
    path = tmp_path / "1_1.png"
    Image.new("L", (side, side)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=message):
        read_image(path)


@pytest.mark.parametrize(
    ("depth", "message"), [(513, "too large to be a scan"), (512, "Expected 536870912 bytes")]
)
def test_more_than_2_29_voxels_are_refused_by_the_header(tmp_path, depth, message):
    content = bytearray(nibabel.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.eye(4)).to_bytes())
    content[40:56] = struct.pack("<8h", 3, 1024, 1024, depth, 1, 1, 1, 1)
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match=message):
        read_volume(tmp_path / "a.nii")


def test_what_only_ends_as_a_zip_is_refused(tmp_path):
    packed = zip_of(tmp_path / "inner.zip", {}).read_bytes()
    (tmp_path / "set.zip").write_bytes(gzip.compress(bytes(10_000_000)) + packed)
    with pytest.raises(DataError, match="does not begin like a zip file"):
        open_data_dir(tmp_path / "set.zip")


def test_what_is_checked_is_what_is_unpacked(tmp_path):
    """A tar whose first member's name begins like a zip, with a zip behind it: both are valid archives."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("PK\x03\x04"), io.BytesIO())
        hidden = tarfile.TarInfo("train/AD/9_9.png")
        hidden.size = 5
        archive.addfile(hidden, io.BytesIO(b"other"))
    packed = zip_of(tmp_path / "inner.zip", {}).read_bytes()
    (tmp_path / "set.zip").write_bytes(content.getvalue() + packed)
    folder = open_data_dir(tmp_path / "set.zip")
    assert [path.name for path in folder.rglob("*.png")] == ["1_1.png"]


def test_a_zip_put_in_the_place_of_another_leaves_none_of_its_images(tmp_path):
    """A subject was withdrawn and the zip packed again: another image has the same name and size."""
    path = zip_of(tmp_path / "set.zip", {"train/AD/2_1.png": b"withdrawn"})
    open_data_dir(path)
    folder = open_data_dir(zip_of(path, {"train/AD/2_1.png": b"remaining"}))
    assert (folder / "train/AD/2_1.png").read_bytes() == b"remaining"


def test_a_changed_copy_of_a_zip_is_unpacked_again_and_only_its_owner_may_read_it(tmp_path):
    path = zip_of(tmp_path / "set.zip", {})
    folder = open_data_dir(path)
    (folder / "train/AD/7_1.png").write_bytes(b"put there")
    assert [file.name for file in open_data_dir(path).rglob("*.png")] == ["1_1.png"]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert open_data_dir(path.rename(tmp_path / "moved.zip")) == folder, "not unpacked twice"


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 9000
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side + 1) * side))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path = tmp_path / "1_1.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    assert path.stat().st_size < 100_000 and Image.open(path).size == (side, side)
    with pytest.raises(DataError, match="9000 x 9000 pixels, too many for a slice"):
        read_image(path)


def test_a_thin_picture_is_refused_before_it_is_padded_to_a_square(tmp_path):
    Image.new("L", (40_000, 8)).save(tmp_path / "1_1.png")
    with pytest.raises(DataError, match="40000 x 8 pixels, too many for a slice"):
        read_image(tmp_path / "1_1.png")


def test_a_gzip_bomb_of_a_nifti_is_not_unpacked(tmp_path):
    """Its header says a small head, and 100 MB follow: they never are in memory."""
    content = io.BytesIO()
    with gzip.open(content, "wb", compresslevel=1) as file:
        file.write(nibabel.Nifti1Image(np.zeros((40, 40, 40), np.int16), np.eye(4)).to_bytes())
        for _ in range(100):
            file.write(bytes(1_000_000))
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(content.getvalue())
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError, match="far longer than its header announces"):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_a_nifti_that_only_says_that_it_is_huge_is_refused_by_its_header(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((20, 20, 20), np.int16), np.eye(4))
    content = bytearray(image.to_bytes())
    content[40:56] = struct.pack("<8h", 3, 30_000, 30_000, 30_000, 1, 1, 1, 1)  # dim
    (tmp_path / "a.nii").write_bytes(content)
    with pytest.raises(VolumeError, match="30000 x 30000 x 30000 voxels: too large"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("dim", [(-300, 300, 300), (-300, -300, -300), (300, 300, 0)])
def test_a_nifti_with_a_dimension_below_one_is_refused_by_its_header(tmp_path, dim):
    """The first one's size is negative: what follows the header, 100 MB here, would be read to its end."""
    content = bytearray(nibabel.Nifti1Image(np.zeros((20, 20, 20), np.int16), np.eye(4)).to_bytes())
    content[40:56] = struct.pack("<8h", 3, *dim, 1, 1, 1, 1)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(bytes(content) + bytes(100_000_000), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(
            VolumeError, match="300 voxels: every|0 voxels: every dimension must be at least 1"
        ):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_what_is_postscript_despite_its_name_starts_no_ghostscript(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"1_1{suffix}"
    box = b"%%BoundingBox: 0 0 32 32\n%%EndComments\n"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n" + box + b"showpage\n%%EOF\n")
    assert Image.open(path).format == "EPS", "what PIL would decode with Ghostscript"
    started = []
    monkeypatch.setattr("subprocess.check_call", lambda *words, **options: started.append(words))
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    with pytest.raises(DataError, match="not an image despite its name"):
        read_image(path)
    with pytest.raises(UserError, match="not an image"):
        encode_anew(tmp_path)
    assert not started


def test_a_pipe_or_a_device_is_no_scan(tmp_path):
    """Reading it would block, or go on, forever."""
    os.mkfifo(tmp_path / "a.nii")
    (tmp_path / "b.nii").symlink_to("/dev/zero")
    for name in ("a.nii", "b.nii"):
        with pytest.raises(VolumeError, match="not a file"):
            read_volume(tmp_path / name)


def test_a_dicom_series_of_too_many_bytes_is_refused_unread(tmp_path):
    folder = write_dicom(head(), tmp_path / "series")
    os.truncate(sorted(folder.iterdir())[3], (4 << 30) + 1)  # sparse: it takes no room
    with pytest.raises(VolumeError, match="too large to be a scan"):
        read_volume(folder)


def test_dicom_that_only_says_that_it_is_huge_is_refused(tmp_path):
    """In a compressed file a few bytes may stand for any number of rows."""
    folder = write_dicom(head(), tmp_path / "series", Rows=60_000, Columns=60_000)
    with pytest.raises(VolumeError, match="60000 x 60000 x .*too large to be a scan"):
        read_volume(folder)


def test_deflated_dicom_is_refused_unread(tmp_path):
    import pydicom
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    folder = write_dicom(head(), tmp_path / "series")
    path = sorted(folder.iterdir())[3]
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    one.save_as(path, enforce_file_format=True)
    with pytest.raises(VolumeError, match="deflated DICOM files"):
        read_volume(folder)


def test_scans_outside_the_folder_are_rejected_by_name(tmp_path):
    """By the table's column path, by a link to a file, and by a link in a folder of DICOM files."""
    outside, scans = tmp_path / "outside", tmp_path / "scans"
    scans.mkdir()
    write_dicom(head(), outside / "series")
    nibabel.save(head(), outside / "a.nii")
    nibabel.save(head(), scans / "own.nii")
    (scans / "within.nii").symlink_to(scans / "own.nii")
    (scans / "link.nii").symlink_to(outside / "a.nii")
    (scans / "series").mkdir()
    for file in (outside / "series").iterdir():
        (scans / "series" / file.name).symlink_to(file)
    absolute = (outside / "a.nii").as_posix()
    paths = ["own.nii", "within.nii", "link.nii", "series", "../outside/a.nii", absolute]
    rows = [f"{path},p{number},{'AD' if number % 2 else 'NC'}" for number, path in enumerate(paths)]
    (tmp_path / "table.csv").write_text("\n".join(["path,subject,group", *rows]) + "\n")

    study = read_study(scans, tmp_path / "table.csv")
    assert sorted(scan.path for scan in study.scans) == ["own.nii", "within.nii"]
    told = {entry.path for entry in study.rejected if entry.reason.startswith("is outside")}
    assert told == {"link.nii", "series", "../outside/a.nii", absolute}
