"""Data leakage: the study table assigns scans to subjects; without it, shared subjects cannot be excluded."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from stand_ins import blob_image

from adni_ldm.data.folder import list_folder
from adni_ldm.data.manifest import write_manifest
from adni_ldm.data.qc import check_folder
from adni_ldm.data.slices import CLASS_NAMES as CLASSES
from adni_ldm.data.slices import load_slices
from adni_ldm.data.splits import DataError
from adni_ldm.errors import UserError

PERSONS = {"1001": "002_S_0001", "1002": "002_S_0001", "1003": "002_S_0003", "1004": "002_S_0004"}
PERSONS |= {f"200{k}": f"003_S_000{k}" for k in (1, 2, 3, 4)}
PERSONS |= {"3001": "004_S_0001", "3002": "004_S_0002", "4001": "005_S_0001", "4002": "005_S_0002"}


def write_table(path: Path, persons: dict[str, str], prefix: str = "I") -> Path:
    """A study table as the archive exports it."""
    rows = [
        f'"{prefix}{image}","{person}","AD","M","{70 + k}"'
        for k, (image, person) in enumerate(persons.items())
    ]
    path.write_text("\n".join(['"Image Data ID","Subject","Group","Sex","Age"', *rows]) + "\n")
    return path


@pytest.mark.parametrize("prefix", ["I", ""])
def test_the_person_of_the_table_is_the_subject(ad_nc_folder, tmp_path, prefix):
    """Validation is split off by subject: two scans of a subject are never in two splits."""
    folder, table = ad_nc_folder(), write_table(tmp_path / "study.csv", PERSONS, prefix)
    for fraction in (0.2, 0.4, 0.6):
        slices = load_slices(folder, val_fraction=fraction, table=table)
        sides = {split: set(slices[split]["subject"]) for split in slices}
        assert not sides["train"] & sides["val"]
        assert sides["train"] | sides["val"] | sides["test"] == set(PERSONS.values())
    report = check_folder(folder, table=table)
    cells = [line.split() for line in str(report).splitlines()]
    assert (
        report.ok and ["train", "AD", "8", "3", "2", "to", "4"] in cells
    )  # images, subjects, slices per subject
    assert not any("cannot be known" in note for note in report.notes)


def test_a_person_on_two_sides_is_refused_by_name(ad_nc_folder, tmp_path):
    folder = ad_nc_folder()
    table = write_table(tmp_path / "study.csv", PERSONS | {"3002": "002_S_0003", "4001": "003_S_0002"})
    (problem,) = check_folder(folder, table=table).problems
    assert "train and test share 2 subjects" in problem
    assert "002_S_0003: scans 1003, 3002" in problem and "003_S_0002: scans 2002, 4001" in problem
    with pytest.raises(DataError, match="002_S_0003"):
        load_slices(folder, table=table)
    assert check_folder(folder).ok, "the names alone do not tell"


def test_without_a_table_the_check_says_that_it_could_not_know(ad_nc_folder, phantom_dir):
    assert any("cannot be known" in note and "--table" in note for note in check_folder(ad_nc_folder()).notes)
    assert not any("cannot be known" in note for note in check_folder(phantom_dir).notes)


def save_slices(folder: Path, *names: str) -> Path:
    """A folder with a file of each name, "train/AD/sub-01_78.png"; no two have the same pixels."""
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob_image((index,), 32, 32).save(path)
    return folder


@pytest.mark.parametrize(
    ("first", "second", "subject"),
    [
        ("002_S_0413_I1001", "002_S_0413_I1002", "002_S_0413"),
        ("ADNI_002_S_0413_MR_MPR_S12_I1001", "002_S_0413", "002_S_0413"),
        ("sub-01_ses-01", "sub-01_ses-02_run-1_T1w", "sub-01"),
    ],
)
def test_two_scans_of_a_subject_by_their_names_are_not_in_two_splits(tmp_path, first, second, subject):
    names = [f"train/{name}_78.png" for name in (f"AD/{first}", "AD/sub-3", "NC/sub-4", "NC/sub-5")]
    listing = list_folder(
        save_slices(tmp_path, *names, f"test/AD/{second}_79.jpeg", "test/NC/sub-6_1.png"), CLASSES
    )
    assert {file.subject for file in listing.files} == {subject, "sub-3", "sub-4", "sub-5", "sub-6"}
    assert listing.subjects_known
    (problem,) = listing.problems
    scans = ", ".join(sorted(name for name in (first, second) if name != subject))
    assert f"train and test share 1 subject ({subject}: scans {scans})" in problem


@pytest.mark.parametrize("name", ["ann_2", "OAS1_0001_MR1", "P01-V2", "218391", "I218391"])
def test_where_a_name_may_be_that_of_a_scan_subjects_are_not_known(tmp_path, name):
    names = [f"train/AD/{name}_78.png", "train/AD/eve_1.png", "train/NC/bob_78.png", "train/NC/cid_1.png"]
    listing = list_folder(save_slices(tmp_path, *names), CLASSES)
    assert not listing.problems and not listing.subjects_known
    assert {file.subject for file in listing.files} == {name, "eve", "bob", "cid"}
    assert any("cannot be known" in note for note in listing.notes)
    rows = [f"{path.removeprefix('train/')},{k}" for k, path in enumerate(names)]
    (tmp_path / "train/metadata.csv").write_text("\n".join(["file_name,subject", *rows]))
    assert list_folder(tmp_path, CLASSES).subjects_known, "metadata.csv has the subjects"


def test_the_image_id_in_an_adni_name_is_looked_up_in_the_table(tmp_path):
    names = ("AD/002_S_0413_I1001", "AD/002_S_0413_I1002", "NC/003_S_0001_MR_I2001", "NC/I2002")
    folder = save_slices(tmp_path / "data", *(f"train/{name}_78.png" for name in names))
    persons = {"1001": "002_S_0413", "1002": "002_S_0413", "2001": "003_S_0001", "2002": "003_S_0002"}
    listing = list_folder(folder, CLASSES, write_table(tmp_path / "study.csv", persons))
    assert not listing.problems and listing.subjects_known
    assert [file.subject for file in listing.files] == ["002_S_0413"] * 2 + ["003_S_0001", "003_S_0002"]


def test_scans_that_the_table_does_not_know_are_refused(ad_nc_folder, tmp_path):
    table = write_table(
        tmp_path / "study.csv", {k: v for k, v in PERSONS.items() if k not in ("1003", "4002")}
    )
    (problem,) = check_folder(ad_nc_folder(), table=table).problems
    assert str(table) in problem and "no row for 2 scans" in problem and "1003, 4002" in problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("", "not a table in UTF-8"),
        ("Subject,Age\n1,2\n", "no column for the image id among Subject, Age"),
        ("Image Data ID,Subject\nI1,a\n1,b\n", "image 1 has two rows that differ (a; b)"),
    ],
)
def test_what_is_no_study_table(ad_nc_folder, tmp_path, text, message):
    table = tmp_path / "study.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(UserError) as error:
        load_slices(ad_nc_folder(), table=table)
    assert message in str(error.value) and str(table) in str(error.value) and "\n" not in str(error.value)
    assert check_folder(ad_nc_folder(), table=table).problems == [str(error.value)]


def test_three_classes_in_the_order_asked_for_and_two_of_three(ad_nc_folder):
    """A class that is not requested is left out, and so are its rows of metadata.csv."""
    names = {"AD": ["1", "2"], "MCI": ["3", "4"], "NC": ["5", "6"]}
    folder = ad_nc_folder({f"train/{cls}": subjects for cls, subjects in names.items()}, slices=(1,))
    rows = [f"{cls}/{name}_1.jpeg,p{name}" for cls, subjects in names.items() for name in subjects]
    (folder / "train/metadata.csv").write_text("\n".join(["file_name,subject", *rows]) + "\n")
    write_manifest(folder, {})
    for classes in (("AD", "MCI", "NC"), ("NC", "MCI", "AD"), ("AD", "NC")):
        slices = load_slices(folder, class_names=classes)
        found = {
            (row["label"], row["subject"])
            for split in slices.values()
            for row in split.remove_columns("image")
        }
        assert found == {(label, f"p{name}") for label, cls in enumerate(classes) for name in names[cls]}


def test_a_folder_that_is_not_what_its_manifest_says_is_refused(ad_nc_folder):
    folder = ad_nc_folder(suffix=".bmp")  # every file has the same size
    write_manifest(folder, {})
    assert any("matches its manifest.json" in note for note in check_folder(folder).notes)
    Image.open(folder / "test/AD/3001_78.bmp").rotate(180).save(folder / "test/AD/3001_78.bmp")
    (problem,) = check_folder(folder).problems  # loading compares names and sizes, the check every byte
    assert "manifest.json: test/AD has changed since" in problem
    (folder / "train/NC/2001_78.bmp").unlink()
    with pytest.raises(DataError, match="manifest.json: train/NC has changed since"):
        load_slices(folder)
