"""manifest.json identifies the data independently of their location, and changes when they do."""

from __future__ import annotations

import getpass
import json
import shutil
import socket

import pytest
from PIL import Image

from adni_ldm.data.manifest import manifest_splits, read_manifest, write_manifest
from adni_ldm.data.splits import DataError

SETTINGS = {
    "plane": "sagittal",
    "size": 256,
    "table": "/home/somebody/study.csv",
    "fractions": {"train": 0.7},
}


def test_counts_and_subjects_of_each_split_and_class(ad_nc_folder):
    folder = ad_nc_folder()
    table = (
        "file_name,subject,image_id\nAD/1001_78.jpeg,Ann,I1\nAD/1001_79.jpeg,Ann,I1\nAD/1002_78.jpeg,Ann,I2\n"
    )
    (folder / "train/metadata.csv").write_text(table + "AD/1002_79.jpeg,Ann,I2\n")
    digest = write_manifest(folder, SETTINGS)
    manifest = read_manifest(folder)
    assert manifest["hash"] == digest and len(digest) == 64
    part = manifest["splits"]["train"]["AD"]
    assert part["subjects"] == ["1003", "1004", "Ann"] and part["scans"] == 4 and part["images"] == 8
    assert manifest_splits(manifest)["Ann"] == "train" and manifest_splits(manifest)["4002"] == "test"
    assert manifest["settings"]["plane"] == "sagittal" and "numpy" in manifest["versions"]


def test_the_hash_follows_the_data_and_nothing_else(ad_nc_folder, tmp_path):
    folder = ad_nc_folder(suffix=".png")
    digest = write_manifest(folder, SETTINGS)
    text = (folder / "manifest.json").read_bytes()
    assert write_manifest(folder, SETTINGS) == digest and (folder / "manifest.json").read_bytes() == text
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert write_manifest(moved, {}) == digest, "another place and other settings, the same data"

    picture = moved / "test/NC/4001_78.png"
    picture.rename(picture.with_name("4003_78.png"))
    renamed = write_manifest(moved, SETTINGS)
    picture.with_name("4003_78.png").rename(picture)
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture)
    changed = write_manifest(moved, SETTINGS)
    (moved / "test/metadata.csv").write_text("file_name,subject\nAD/3001_78.png,somebody else\n")
    assert len({digest, renamed, changed, write_manifest(moved, SETTINGS)}) == 4


def test_it_names_no_machine_and_no_user_and_leaves_nothing_else(ad_nc_folder, tmp_path):
    folder = ad_nc_folder()
    paths = {
        "input_dir": str(tmp_path),
        "windows": r"C:\Users\me\adni",
        "list": [tmp_path / "a.csv"],
        "x": 0.5,
    }
    write_manifest(folder, SETTINGS | paths)
    text = (folder / "manifest.json").read_text()
    assert str(tmp_path) not in text and "somebody" not in text and "Users" not in text
    assert socket.gethostname() not in text and f'"{getpass.getuser()}"' not in text
    settings = json.loads(text)["settings"]
    assert settings["table"] == "study.csv" and settings["list"] == ["a.csv"] and settings["x"] == 0.5
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "test", "train"]


def test_what_is_no_manifest_is_refused(ad_nc_folder):
    folder = ad_nc_folder()
    assert read_manifest(folder) is None
    for text, message in (
        ("{", "not a readable manifest"),
        ('{"format": 99}', "format 99"),
        ("[]", "not a readable manifest"),
    ):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=message) as error:
            read_manifest(folder)
        assert "\n" not in str(error.value)
