"""Files joined with a study's table: three layouts, synonyms of a group, every file accounted for."""

from pathlib import Path

import pytest

from adni_ldm.errors import UserError
from adni_ldm.preprocessing.conversion import decide_splits
from adni_ldm.preprocessing.study import read_study

HEADER = '"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date"\n'


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def archive_row(image: str, subject: str, group: str, modality: str = "MRI", age: int = 75) -> str:
    return f'"{image}","{subject}","{group}","F","{age}","sc","{modality}","MPRAGE","Original","5/02/2006"\n'


def archive(root: Path, rows: str, files: dict[str, str]) -> Path:
    """{"I1": "002_S_0001"} becomes 002_S_0001/MPRAGE/2006-05-02_12_31_52.0/I1/scan.nii; the table beside."""
    (root / "ADNI").mkdir(parents=True, exist_ok=True)
    for image, subject in files.items():
        touch(root / "ADNI" / subject / "MPRAGE" / "2006-05-02_12_31_52.0" / image / "scan.nii")
    table = root / "study.csv"
    table.write_text(HEADER + rows, encoding="utf-8")
    return table


def reasons(study) -> dict[str, str]:
    return {entry.image_id or entry.path or entry.subject: entry.reason for entry in study.rejected}


def test_the_archives_tree_and_csv(tmp_path):
    rows = archive_row("I1", "002_S_0001", "AD") + archive_row("I2", "002_S_0002", "CN", age=71)
    rows += archive_row("I3", "002_S_0002", "CN", age=73) + archive_row("I4", "002_S_0003", "MCI")
    files = {"I1": "002_S_0001", "I2": "002_S_0002", "I3": "002_S_0002", "I4": "002_S_0003"}
    study = read_study(tmp_path / "ADNI", archive(tmp_path, rows, files))
    assert [(s.key, s.label, s.image_id, s.age, s.session) for s in study.scans] == [
        ("002_S_0001_I1", "AD", "I1", "75", "sc"),
        ("002_S_0002_I2", "NC", "I2", "71", "sc"),
        ("002_S_0002_I3", "NC", "I3", "73", "sc"),
    ]
    assert study.scans[0].path == "002_S_0001/MPRAGE/2006-05-02_12_31_52.0/I1/scan.nii"
    assert study.subjects.to_dict("records") == [
        {"subject": "002_S_0001", "label": "AD", "age": 75.0, "sex": "F"},
        {"subject": "002_S_0002", "label": "NC", "age": 71.0, "sex": "F"},
    ]
    assert study.notes == ["excluded: 1 rows of other classes (1 MCI); see --classes"]
    assert not study.rejected


def test_older_archives_have_the_image_in_the_files_name(tmp_path):
    """The folder is the series, S17, and no image 17."""
    table = archive(
        tmp_path, archive_row("I99", "002_S_0001", "AD") + archive_row("17", "002_S_0002", "CN"), {}
    )
    name = "ADNI_002_S_0001_MR_MPRAGE_br_raw_20060501_1_S17_I99"
    touch(tmp_path / "ADNI/002_S_0001/MPRAGE/2006-05-02_12_31_52.0/S17" / f"{name}.nii.gz")
    dicom = tmp_path / "ADNI/002_S_0002/MPRAGE/2006-05-02_12_31_52.0/S18"
    touch(dicom / "ADNI_002_S_0002_MR_MPRAGE_br_raw_2006_1_S18_I17.dcm", bytes(128) + b"DICM")
    study = read_study(tmp_path / "ADNI", table)
    assert [scan.key for scan in study.scans] == ["002_S_0001_I99", "002_S_0002_17"]
    assert (tmp_path / "ADNI" / study.scans[1].path) == dicom


def test_three_classes_where_asked_for(tmp_path):
    rows = "".join(
        archive_row(f"I{k}", f"002_S_000{k}", g) for k, g in enumerate(("AD", "CN", "LMCI", "SMC"))
    )
    table = archive(tmp_path, rows, {f"I{k}": f"002_S_000{k}" for k in range(4)})
    study = read_study(tmp_path / "ADNI", table, classes=("AD", "NC", "MCI"))
    assert [scan.label for scan in study.scans] == ["AD", "NC", "MCI"]
    study = read_study(tmp_path / "ADNI", table, classes=("AD", "CN", "LMCI"))
    assert [scan.label for scan in study.scans] == ["AD", "CN", "LMCI"]


def test_what_does_not_fit_is_rejected_with_its_reason(tmp_path):
    rows = archive_row("I1", "002_S_0001", "AD") + archive_row("I2", "002_S_0002", "CN")
    rows += archive_row("I3", "002_S_0003", "AD") + archive_row("I4", "002_S_0003", "CN")  # two groups
    rows += archive_row("I5", "002_S_0005", "AD")  # no file
    rows += archive_row("I6", "002_S_0006", "")
    rows += archive_row("I7", "002_S_0007", "AD", modality="PET")
    rows += archive_row("I8", "002_S_0008", "AD")
    files = {f"I{k}": f"002_S_000{k}" for k in (1, 2, 3, 6, 7)} | {
        "I4": "002_S_0003",
        "I9": "002_S_0009",
        "I8": "002_S_0088",
    }
    table = archive(tmp_path, rows, files)
    touch(tmp_path / "ADNI/002_S_0002/copy/I2/scan.nii")
    study = read_study(tmp_path / "ADNI", table)
    assert [scan.key for scan in study.scans] == ["002_S_0001_I1", "002_S_0002_I2"]
    assert reasons(study) == {
        "I2": "the same image as 002_S_0002/MPRAGE/2006-05-02_12_31_52.0/I2/scan.nii",
        "I3": "its subject has 2 groups: AD, NC",
        "I4": "its subject has 2 groups: AD, NC",
        "I5": "no file for this row of the table",
        "I6": "its row of the table has no group",
        "I8": "no file for this row of the table",
        "002_S_0009/MPRAGE/2006-05-02_12_31_52.0/I9/scan.nii": "no row of the table matches it",
        "002_S_0088/MPRAGE/2006-05-02_12_31_52.0/I8/scan.nii": (
            "is in a folder of 002_S_0088, but the table lists its image for 002_S_0008"
        ),
    }
    assert "002_S_0003" not in set(study.subjects.subject)
    assert "002_S_0005" in set(study.subjects.subject), "a subject without a file still has a split"


def test_bids(tmp_path):
    for path in (
        "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
        "sub-01/ses-1/anat/sub-01_ses-1_FLAIR.nii.gz",
        "sub-01/ses-1/func/sub-01_ses-1_T1w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii",
        "derivatives/prep/sub-02/anat/sub-02_T1w.nii",
    ):
        touch(tmp_path / path)
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tdiagnosis\tage\tsex\nsub-01\tDementia\t80\tmale\nsub-02\tcontrol\tn/a\tF\n"
    )
    study = read_study(tmp_path)
    assert [(s.key, s.label, s.session, s.age, s.sex) for s in study.scans] == [
        ("sub-01_ses-1", "AD", "1", "80", "M"),
        ("sub-01_ses-2", "AD", "2", "80", "M"),
        ("sub-02", "NC", "", "", "F"),
    ]
    assert not study.rejected


def test_a_bids_file_without_a_name_is_rejected(tmp_path):
    """Its key would be empty, and its folder in the store that of all scans, which converting it deletes."""
    for path in ("sub-01/anat/_T1w.nii.gz", "sub-01/anat/._T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii"):
        touch(tmp_path / path)
    (tmp_path / "participants.tsv").write_text("participant_id\tgroup\n01\tAD\n02\tNC\n")
    study = read_study(tmp_path)
    assert [scan.key for scan in study.scans] == ["sub-02"]
    ((path, reason),) = reasons(study).items()
    assert path == "sub-01/anat/_T1w.nii.gz" and "rename it" in reason


def test_a_plain_folder_with_paths_and_words_beyond_ascii(tmp_path):
    touch(tmp_path / "data/Zoë/T1 größe.nii.gz")
    touch(tmp_path / "data/b/T1.nii")
    touch(tmp_path / "data/b/T1_mask.nii")
    touch(tmp_path / "data/c.nii")
    table = tmp_path / "tabelle.csv"
    table.write_text("Datei,Wer,DX\nZoë/T1 größe.nii.gz,Zoë/1,AD\n./b/T1.nii,007,CN\n", encoding="utf-8-sig")
    columns = {"path": "Datei", "subject": "Wer", "group": "DX"}
    study = read_study(tmp_path / "data", table, columns=columns, ignore=["*_mask.nii"])
    assert [(s.subject, s.path) for s in study.scans] == [
        ("007", "b/T1.nii"),
        ("Zoë/1", "Zoë/T1 größe.nii.gz"),
    ]
    assert study.scans[1].key.startswith("Zoë-1_") and "/" not in study.scans[1].key
    assert reasons(study) == {"c.nii": "no row of the table matches it"}


@pytest.mark.parametrize(
    ("text", "columns", "message"),
    [
        ("Subject,Age\nx,1\n", {}, "no column for the group among Subject, Age"),
        ("Subject,Group\nx,AD\n", {"group": "DX"}, "no column 'DX'; it has Subject, Group"),
        ("Subject,Group\nx,MCI\n", {}, "no row of AD or NC"),
        ("Subject,Group\nx,AD\nx,AD\ny,CN\n", {"dx": "DX"}, "--columns dx="),
        ("Subject,Group,Visit\nx,AD,1\nx,AD,2\n", {}, "x has several rows"),
        ("path,Subject,Group\na.nii,x,AD\na.nii,y,AD\n", {}, "two rows for a.nii"),
        ("Image ID,Subject,Group\nI1,x,AD\n1,y,AD\n", {}, "image 1 has two rows that differ"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, columns, message):
    (tmp_path / "table.csv").write_text(text)
    touch(tmp_path / "data/a.nii")
    with pytest.raises(UserError, match=message):
        read_study(tmp_path / "data", tmp_path / "table.csv", columns=columns)


def test_missing_folders_and_tables_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read_study(tmp_path / "nowhere", tmp_path / "table.csv")
    with pytest.raises(UserError, match="table.csv: no such file"):
        read_study(tmp_path, tmp_path / "table.csv")
    (tmp_path / "latin.csv").write_bytes("Subject,Group\nZo\xeb,AD\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin.csv: not a table in UTF-8"):
        read_study(tmp_path, tmp_path / "latin.csv")


def test_splits_keep_who_was_where_and_a_test_set_that_others_chose(tmp_path):
    rows = "".join(archive_row(f"I{k}", f"002_S_{k:04d}", "AD" if k % 2 else "CN") for k in range(40))
    subjects = read_study(tmp_path / "ADNI", archive(tmp_path, rows, {})).subjects
    few = decide_splits(subjects[:20], {}, 0.15, 0.15)
    more = decide_splits(subjects, few, 0.15, 0.15)
    assert {subject: more[subject] for subject in few} == few
    chosen = {"002_S_0003", "002_S_0010", "somebody else"}
    splits = decide_splits(subjects, {}, 0.2, 0.15, chosen)
    assert {subject for subject, split in splits.items() if split == "test"} == chosen - {"somebody else"}
    moved = next(subject for subject, split in few.items() if split == "train")
    with pytest.raises(UserError, match=f"{moved} was in train before"):
        decide_splits(subjects, few, 0.15, 0.15, {moved} | {s for s, split in few.items() if split == "test"})
    with pytest.raises(UserError, match="none is in the study table"):
        decide_splits(subjects, {}, 0.15, 0.15, {"unknown"})
    with pytest.raises(UserError, match="leave some for training"):
        decide_splits(subjects, {}, 0.5, 0.5)
