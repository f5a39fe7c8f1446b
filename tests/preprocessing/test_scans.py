"""prepare_data.py scans from end to end: killed, resumed or short of room, the same bytes."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from datasets import load_dataset
from PIL import Image
from volume_files import head, write_dicom

from adni_ldm.data.folder import list_folder
from adni_ldm.data.manifest import read_manifest
from adni_ldm.errors import UserError
from adni_ldm.preprocessing import conversion as convert
from adni_ldm.preprocessing.conversion import convert_scans, decide_splits, earlier_splits
from adni_ldm.preprocessing.slicing import SlicingSettings
from adni_ldm.preprocessing.study import read_study

ROOT = Path(__file__).parents[2]
SETTINGS = SlicingSettings(slices=4, spacing_mm=8.0, image_size=48, field_of_view_mm=208.0)
FLAGS = ["--slices", "4", "--spacing_mm", "8", "--image_size", "48", "--field_of_view_mm", "208"]
SUBJECTS = 12


def digests(folder: Path) -> dict[str, str]:
    """Of what a reader of the folder sees: everything but the store."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and ".scans" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A folder with ADNI/ of 12 subjects, two with two scans, one in DICOM; and study.csv."""
    root = tmp_path_factory.mktemp("archive")
    lines = ["Image Data ID,Subject,Group,Sex,Age,Visit,Modality,Description,Acq Date"]
    for number in range(SUBJECTS + 2):
        index = number % SUBJECTS
        subject, image = f"{index:03d}_S_{index:04d}", f"I{100 + number}"
        folder = root / "ADNI" / subject / "MPRAGE" / "2006-05-02_12_31_52.0" / image
        if number == 5:
            write_dicom(head(number), folder)
        else:
            folder.mkdir(parents=True)
            nibabel.save(head(number), folder / ("scan.nii.gz" if number % 2 else "scan.nii"))
        age, visit = 60 + index, "m12" if number >= SUBJECTS else "sc"
        lines.append(f"{image},{subject},{'AD' if index % 2 else 'CN'},F,{age},{visit},MRI,MPRAGE,5/2/2006")
    (root / "study.csv").write_text("\n".join(lines) + "\n")
    return root


def prepare(archive: Path, output_dir: Path, settings=SETTINGS, workers=1, study=None):
    study = study or read_study(archive / "ADNI", archive / "study.csv")
    splits = decide_splits(study.subjects, earlier_splits(output_dir), 0.15, 0.15)
    return convert_scans(study, splits, archive / "ADNI", output_dir, settings, workers)


def command(archive: Path, output_dir: Path, *more: str) -> list[str]:
    paths = ["--input_dir", archive / "ADNI", "--table", archive / "study.csv", "--output_dir", output_dir]
    return [sys.executable, ROOT / "prepare_data.py", "scans", *paths, *FLAGS, *more]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(*arguments, capture_output=True, text=True, cwd=ROOT, **options)


@pytest.fixture(scope="module")
def undisturbed(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "adni"
    prepare(archive, folder)
    return folder


def test_the_result_is_read_by_our_loader_and_by_imagefolder(undisturbed):
    scan = list_folder(undisturbed, ("AD", "NC"))
    assert not scan.problems
    assert len(scan.files) == 4 * (SUBJECTS + 2)
    assert {f.subject for f in scan.files} == {f"{k:03d}_S_{k:04d}" for k in range(SUBJECTS)}
    table = pd.concat(
        pd.read_csv(undisturbed / split / "metadata.csv", dtype=str).assign(split=split)
        for split in ("train", "val", "test")
    )
    assert list(table.columns[:-1]) == (
        "file_name label subject session image_id age sex slice slice_mm plane pixel_mm".split()
    )
    assert (table.groupby("subject").split.nunique() == 1).all()
    assert table.file_name.str.rsplit("/", n=1).str[1].is_unique
    row = table[table.file_name == "NC/000_S_0000_I112_03.png"].iloc[0]
    assert row[["label", "session", "image_id", "age", "slice_mm", "plane"]].tolist() == (
        ["NC", "m12", "I112", "60", "12.0", "sagittal"]
    )
    for name in table.split + "/" + table.file_name:
        with Image.open(undisturbed / name) as picture:
            assert picture.mode == "L" and picture.size == (48, 48)
    loaded = load_dataset("imagefolder", data_dir=str(undisturbed))
    assert sum(len(part) for part in loaded.values()) == len(table)
    manifest = read_manifest(undisturbed)
    assert manifest["settings"]["plane"] == "sagittal"
    assert sum(part["scans"] for s in manifest["splits"].values() for part in s.values()) == SUBJECTS + 2


def test_sixteen_bits(archive, tmp_path):
    study = read_study(archive / "ADNI", archive / "study.csv")
    study.scans = study.scans[:2]
    deep = SlicingSettings(**(SETTINGS.__dict__ | {"bits": 16}))
    folder = prepare(archive, tmp_path / "adni", settings=deep, study=study)
    row = folder.table.iloc[1]
    with Image.open(tmp_path / "adni" / row.split / row.file_name) as picture:
        values = np.asarray(picture)
    assert values.dtype == np.uint16 and values.max() > 60000 and len(np.unique(values)) > 256


def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(archive, undisturbed, tmp_path):
    """kill -9 of the command alone: its workers end with it, and the second run does only what is missing."""
    output = tmp_path / "adni"
    process = subprocess.Popen(
        command(archive, output, "--workers", "2"),
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    volumes = output / ".scans" / "volumes"
    until = time.monotonic() + 240
    while not (volumes.is_dir() and len(list(volumes.iterdir())) >= 3):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers), "workers write on after the kill"

    done = {p.name: p.stat().st_ino for p in volumes.iterdir()}
    assert 3 <= len(done) < SUBJECTS + 2
    for volume in volumes.iterdir():
        assert len(list(volume.glob("*.png"))) == 4 and (volume / "record.json").is_file()
    assert not (output / "train").exists()

    again = run(command(archive, output, "--workers", "2"))
    assert again.returncode == 0, again.stderr
    assert {name: (volumes / name).stat().st_ino for name in done} == done, "done twice"
    assert not (output / ".scans" / "partial").exists()
    mine, other = digests(output), digests(undisturbed)
    assert mine.pop("manifest.json") and other.pop("manifest.json")  # its settings name the flags
    assert mine == other
    assert read_manifest(output)["hash"] == read_manifest(undisturbed)["hash"]


def _children(pid: int) -> list[int]:
    """Processes below `pid`, of any depth."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def test_a_second_run_does_nothing_and_a_changed_file_is_done_anew(archive, undisturbed, tmp_path):
    copy = tmp_path / "archive"
    subprocess.run(["cp", "-r", archive, copy], check=True)
    prepare(copy, tmp_path / "adni")
    study = read_study(copy / "ADNI", copy / "study.csv")
    splits = earlier_splits(tmp_path / "adni")
    settings = (study, splits, copy / "ADNI", tmp_path / "adni", SETTINGS, 1)
    volumes = tmp_path / "adni" / ".scans" / "volumes"
    before = {path.name: path.stat().st_ino for path in volumes.iterdir()}
    convert_scans(*settings)
    assert {path.name: path.stat().st_ino for path in volumes.iterdir()} == before
    scan = study.scans[0]
    other = nibabel.load(copy / "ADNI" / scan.path)
    nibabel.save(nibabel.Nifti1Image(other.get_fdata(), other.affine), copy / "ADNI" / scan.path)
    convert_scans(*settings)
    after = {path.name: path.stat().st_ino for path in volumes.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {scan.key}


def test_adding_scans_moves_no_subject(archive, tmp_path):
    study = read_study(archive / "ADNI", archive / "study.csv")
    fewer = read_study(archive / "ADNI", archive / "study.csv")
    fewer.subjects = fewer.subjects[: SUBJECTS // 2]
    fewer.scans = [scan for scan in fewer.scans if scan.subject in set(fewer.subjects.subject)]
    before = prepare(archive, tmp_path / "adni", study=fewer).table
    after = prepare(archive, tmp_path / "adni", study=study).table
    now = after.set_index("file_name").split
    assert (now[before.file_name].to_numpy() == before.split.to_numpy()).all()
    assert len(after) == 4 * (SUBJECTS + 2)


def test_bad_scans_are_listed_and_the_rest_is_done(archive, undisturbed, tmp_path):
    """Exit status 3; and the splits are those of the whole table."""
    copy = tmp_path / "archive"
    subprocess.run(["cp", "-r", archive, copy], check=True)
    files = {int(p.parent.name[1:]): p for p in (copy / "ADNI").rglob("scan.nii*")}
    files[100].write_bytes(files[100].read_bytes()[:5000])
    image = nibabel.load(files[101])
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, 9, np.int16), image.affine), files[101])
    nibabel.save(nibabel.Nifti1Image(np.stack([image.dataobj] * 2, -1), image.affine), files[103])
    files[104].unlink()
    output = tmp_path / "Größe ✓"
    result = run(command(copy, output, "--workers", "2"))
    assert result.returncode == 3, result.stderr
    assert "4 scans or rows rejected" in result.stdout and "Traceback" not in result.stderr
    rejected = pd.read_csv(output / "rejected.csv", dtype=str, keep_default_na=False).set_index("image_id")
    assert set(rejected.index) == {"I100", "I101", "I103", "I104"}
    assert "cannot be read" in rejected.reason["I100"]
    assert rejected.reason["I101"] == "all voxels are 9"
    assert "4-D" in rejected.reason["I103"]
    assert rejected.reason["I104"] == "no file for this row of the table"
    mine, other = digests(output), digests(undisturbed)
    pictures = {name for name in mine if name.endswith(".png")}
    assert len(pictures) == 4 * (SUBJECTS + 2 - 4)
    assert all(mine[name] == other[name] for name in pictures), "a slice or its split changed"

    for number in (100, 101, 103, 104):  # mended: the same command does what is missing
        source = archive / "ADNI" / files[number].relative_to(copy / "ADNI")
        files[number].write_bytes(source.read_bytes())
    result = run(command(copy, output, "--workers", "1"))
    assert result.returncode == 0, result.stderr
    assert not (output / "rejected.csv").exists()
    mine = digests(output)
    assert all(mine[name] == digest for name, digest in other.items() if name != "manifest.json")


def test_a_full_disk_stops_the_run_and_it_goes_on_afterwards(archive, undisturbed, tmp_path):
    """Files may grow to 600 bytes: as on a full disk, nothing new is written, nothing old is lost."""
    output = tmp_path / "adni"
    study = read_study(archive / "ADNI", archive / "study.csv")
    study.scans = study.scans[:1]
    prepare(archive, output, study=study)
    before = sorted((output / ".scans" / "volumes").iterdir())

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))

    result = run(command(archive, output, "--workers", "1"), preexec_fn=limit)
    assert result.returncode == 1
    assert (
        f"{output}: cannot be written (File too large)" in result.stderr and "Traceback" not in result.stderr
    )
    assert sorted((output / ".scans" / "volumes").iterdir()) == before
    json.loads((output / ".scans" / "plan.json").read_text())  # the one of before, whole
    prepare(archive, output)
    assert digests(output) == digests(undisturbed)


def test_a_full_disk_while_pictures_are_written_keeps_what_is_done(
    archive, undisturbed, tmp_path, monkeypatch
):
    output = tmp_path / "adni"
    save, saved = Image.Image.save, []

    def fail_at_the_tenth(self, *args, **kwargs):
        saved.append(args)
        if len(saved) == 10:
            raise OSError(28, os.strerror(28))
        save(self, *args, **kwargs)

    monkeypatch.setattr(convert.Image.Image, "save", fail_at_the_tenth)
    with pytest.raises(UserError, match="cannot be written .No space left on device.; correct that and run"):
        prepare(archive, output)
    assert len(list((output / ".scans" / "volumes").iterdir())) == 2
    assert not any((output / ".scans").glob("partial/*"))
    monkeypatch.undo()
    prepare(archive, output)
    assert digests(output) == digests(undisturbed)


def test_an_output_that_cannot_be_written_is_named(archive, tmp_path):
    """As root no mode bits bind: a file stands in the way, or a file system that takes no folders."""
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "adni", Path("/proc/adni")):
        with pytest.raises(UserError, match=f"{output}.*(cannot be written|not made by this command)"):
            prepare(archive, output)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_on_one_folder(archive, held_by_another, tmp_path):
    with held_by_another(tmp_path / ".scans"), pytest.raises(UserError, match="is being written by process"):
        prepare(archive, tmp_path)
    assert [path.name for path in (tmp_path / ".scans").iterdir()] == [".lock"]


def test_a_folder_of_another_making_is_left_alone(archive, undisturbed, tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="holds train, not made by this command"):
        prepare(archive, tmp_path)
    before = digests(undisturbed)
    with pytest.raises(UserError, match="image_size 48, now 32"):
        prepare(archive, undisturbed, settings=SlicingSettings(**(SETTINGS.__dict__ | {"image_size": 32})))
    assert digests(undisturbed) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--slices", "0"], "slices=0: choose 1 to 100"),
        (["--percentiles", "90", "10"], "percentiles=90,10"),
        (["--columns", "group"], "--columns group: expected"),
        (["--classes", "AD"], "--classes AD"),
        (["--test_subjects", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--workers", "0"], "workers=0"),
    ],
)
def test_wrong_flags_are_named_in_one_line(archive, tmp_path, flags, message):
    import prepare_data

    with pytest.raises(UserError, match=message):
        prepare_data.scans([str(part) for part in command(archive, tmp_path / "adni", *flags)[3:]])
    assert not (tmp_path / "adni" / "train").exists()
