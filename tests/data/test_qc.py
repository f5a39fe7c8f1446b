"""check_folder finds everything that is wrong, and load_slices refuses what it finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare_data
from adni_ldm.data.qc import check_folder
from adni_ldm.data.slices import DataError, load_slices


def test_sound_folder_is_counted(ad_nc_folder):
    folder = ad_nc_folder()
    Image.new("RGB", (256, 256)).save(folder / "test/NC/4003_78.jpeg")
    Image.fromarray(np.zeros((240, 256), np.uint16)).save(folder / "test/NC/4004_78.png")
    report = check_folder(folder)
    assert report.ok, str(report)
    cells = [line.split() for line in str(report).splitlines()]
    assert ["train", "AD", "8", "4", "2"] in cells  # images, subjects, slices a subject
    assert ["test", "NC", "6", "4", "1", "to", "2"] in cells
    assert "256 x 240: 25, 256 x 256: 1" in str(report)
    assert "L: 24" in str(report) and "RGB: 1" in str(report) and "I;16: 1" in str(report)
    assert "no val/ folder" in str(report)


def empty_class(folder: Path) -> Path:
    for path in (folder / "train/AD").iterdir():
        path.unlink()
    return folder / "train/AD"


def empty_file(folder: Path) -> Path:
    (folder / "test/AD/3001_78.jpeg").write_bytes(b"")
    return folder / "test/AD/3001_78.jpeg"


def broken_link(folder: Path) -> Path:
    (folder / "train/AD/9_1.jpeg").symlink_to(folder / "nowhere.jpeg")
    return folder / "train/AD/9_1.jpeg"


def no_subject(folder: Path) -> Path:
    return (folder / "train/NC/2001_78.jpeg").rename(folder / "train/NC/scan.jpeg")


def no_train(folder: Path) -> Path:
    (folder / "train").rename(folder / "training")
    return folder


def metadata(text: str):
    def write(folder: Path) -> Path:
        (folder / "train/metadata.csv").write_bytes(text.encode("latin-1"))
        return folder / "train"

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_class, "no images of class AD"),
        (empty_file, "0 bytes"),
        (broken_link, "cannot be read"),
        (no_subject, "no subject"),
        (no_train, "no train/ folder"),
        (metadata("path\nAD/1001_78.jpeg\n"), "no column file_name"),
        (metadata("subject,file_name\n1001\n1001,AD/1001_78.jpeg\n"), "row 2 has no file_name"),
        (metadata("file_name,subject\nAD/1001_78.jpeg,1001\n,1001\n"), "row 3 has no file_name"),
        (metadata("file_name\nAD/gone_1.jpeg\n"), "gone_1.jpeg: is in metadata.csv but missing"),
        (metadata("file_name,label\nAD/1001_78.jpeg,NC\n"), "has label NC in metadata.csv"),
        (metadata("file_name,slice\nAD/1001_78.jpeg,x\n"), "'x' is not a whole number"),
        (metadata("file_name,subject\nAD/1001_78.jpeg,J\xf6rg\n"), "UTF-8"),
    ],
)
def test_what_the_check_finds_loading_refuses(ad_nc_folder, damage, message):
    """Each problem is one line with the path and what to do, without a traceback."""
    folder = ad_nc_folder()
    culprit = damage(folder)
    report = check_folder(folder)
    assert not report.ok
    (problem,) = report.problems
    assert str(culprit) in problem and message in problem and ";" in problem and "\n" not in problem
    assert problem in str(report)
    with pytest.raises(DataError) as error:
        load_slices(folder)
    assert str(error.value) == problem


def test_all_problems_are_found_at_once(ad_nc_folder):
    folder = ad_nc_folder()
    truncated, no_image = folder / "test/NC/4001_78.jpeg", folder / "test/NC/4002_78.jpeg"
    truncated.write_bytes(truncated.read_bytes()[:-800])
    no_image.write_bytes(b"not a jpeg at all")
    culprits = [no_subject(folder), empty_file(folder), truncated, no_image]
    (folder / "val/AD").mkdir(parents=True)  # no images in it, and no NC
    Image.new("L", (256, 240)).save(folder / "test/AD/1002_78.jpeg")
    report = check_folder(folder)
    for culprit in (*culprits, folder / "val/AD", folder / "val/NC"):
        assert sum(p.startswith(f"{culprit}:") for p in report.problems) == 1, culprit
    assert any("train and test share 1 subject (1002)" in p for p in report.problems)
    assert len(report.problems) == 7
    with pytest.raises(DataError, match=r"\(4 more: python prepare_data.py check"):
        load_slices(folder)


@pytest.mark.parametrize("name", ["missing", "notes.txt", "empty"])
def test_what_is_no_data_folder(tmp_path, name):
    (tmp_path / "notes.txt").write_text("not a zip")
    (tmp_path / "empty").mkdir()
    report = check_folder(tmp_path / name)
    assert not report.ok and len(report.problems) == 1 and str(tmp_path / name) in str(report)
    with pytest.raises(DataError, match=name):
        load_slices(tmp_path / name)


def test_other_classes_and_files_are_mentioned(ad_nc_folder):
    """MCI beside AD and NC does not prevent training, and is reported."""
    folder = ad_nc_folder()
    (folder / "train/MCI").mkdir()
    (folder / "train/AD/Thumbs.db").write_bytes(b"x")
    report = check_folder(folder)
    assert report.ok
    assert any(str(folder / "train/MCI") in note for note in report.notes)
    assert any(str(folder / "train/AD") + ":" in note for note in report.notes)
    assert len(load_slices(folder)["test"]) == 8


def test_pictures_land_in_the_data_only_if_asked_to(ad_nc_folder, monkeypatch, capsys):
    folder = ad_nc_folder()
    monkeypatch.chdir(folder)
    assert prepare_data.check(["."]) == 0
    assert "would be inside the data" in capsys.readouterr().out and not (folder / "check").exists()
    monkeypatch.chdir(folder.parent)
    assert prepare_data.check([str(folder), "--classes", "AD,CN"]) == 0
    drawn = sorted(path.name for path in (folder.parent / "check").iterdir())
    assert {"contact_sheet.png", "histograms.png"} <= set(drawn)
    prepare_data.check([str(folder), "--figures", "none"])
    assert "figures" not in capsys.readouterr().out.splitlines()[-1]
