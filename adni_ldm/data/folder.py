"""The layout of a data folder, the subjects in it, and what is wrong with it.

A folder is {train,val,test}/{AD,NC}/SUBJECT_SLICE.png (or .jpeg, .tif ...). Each split folder may hold a
metadata.csv, whose columns file_name, subject, image_id and slice go before what the file's name says.
`list_folder` is the only reader of this layout: `load_slices` refuses a folder with problems, `check_folder`
prints them.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path

from adni_ldm.data.persons import Person, image_key, read_persons
from adni_ldm.data.splits import SPLITS, DataError, shared_subjects

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_ALIASES = {"val": ("val", "validation", "valid"), "NC": ("NC", "CN")}  # other names the same folder goes by
_NAME = re.compile(r"(?P<subject>.+)_(?P<slice>\d+)")  # 218391_78, sub-01_78, 002_S_0413_78
_IMAGE_ID = re.compile(r"[Ii]?\d+")  # what stands before _ is a scan's number in the archive, and no person


SUBJECTS_UNKNOWN = (
    "the number before _ is a scan's, and one person may have several: whether two splits share a person "
    "cannot be known from the names; give the archive's study table with --table"
)


@dataclass(frozen=True)
class SliceFile:
    """One image file. `subject` and `slice` are None where neither the name nor metadata.csv tells them."""

    path: str  # absolute, with forward slashes
    split: str  # train, val or test
    label: int  # index into class_names
    subject: str | None
    slice: int | None
    scan: str | None = None  # which of the subject's scans; None where the subject is
    size: int = 0  # bytes
    age: float | None = None  # years


@dataclass
class FolderListing:
    """What lies in a data folder, by names and sizes alone: no image is decoded."""

    root: Path  # the folder that holds train/
    class_names: Sequence[str] = ()
    table: str | Path | None = None  # the study table that named the subjects
    subjects_known: bool = True  # no, where a subject is a scan's number taken for a person
    files: list[SliceFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # each names a path and what to do; training is refused
    notes: list[str] = field(default_factory=list)  # worth knowing, no hindrance

    def raise_problems(self) -> None:
        """Raises DataError with the first problem, and the number of the others."""
        if self.problems:
            others = len(self.problems) - 1
            more = f" ({others} more: python prepare_data.py check {self.root})" if others else ""
            raise DataError(self.problems[0] + more)


def list_folder(
    data_dir: str | Path, class_names: Sequence[str], table: str | Path | None = None
) -> FolderListing:
    """Every image of a data folder with its split, label, subject and slice, and all that is wrong by name.

    `data_dir` is the folder that holds train/, or a parent of it. `table` is the archive's study table: what
    stands before _ in a file's name, or in metadata.csv's column image_id, is looked up in it, and the person
    found there is the subject. Nothing is written, no image is decoded.

    Raises UserError where there is no such folder, or no such table.
    """
    persons = read_persons(table) if table else None
    scan = FolderListing(
        _find_root(Path(os.path.abspath(os.path.expanduser(data_dir)))), tuple(class_names), table
    )
    for split in SPLITS:
        folders = [scan.root / name for name in _ALIASES.get(split, (split,)) if (scan.root / name).is_dir()]
        if folders:
            for folder in folders:
                _scan_split(scan, folder, split, class_names)
            _report_empty_classes(scan, folders[0], split, class_names)
        elif split == "train":
            scan.problems.append(f"{scan.root}: there is no train/ folder; put train/AD and train/NC there")
        else:
            then = "it is taken out of train, by subject" if split == "val" else "training does without"
            scan.notes.append(f"{scan.root}: there is no {split}/ folder; {then}")
    if persons is not None:
        _name_persons(scan, persons)
    elif not scan.subjects_known:
        scan.notes.append(f"{scan.root}: {SUBJECTS_UNKNOWN}")
    _report_shared_subjects(scan)
    return scan


def classes_in(data_dir: str | Path) -> tuple[str, ...]:
    """Names of the class folders of a data folder, sorted; CN is read as NC.

    Raises DataError where there is no such folder.
    """
    root = _find_root(Path(os.path.abspath(os.path.expanduser(data_dir))))
    folders = [root / name for split in SPLITS for name in _ALIASES.get(split, (split,))]
    names = {sub.name for folder in folders if folder.is_dir() for sub in _subfolders(folder)}
    usual = {other: cls for cls, others in _ALIASES.items() for other in others}
    return tuple(sorted({usual.get(name, name) for name in names}))


def _subfolders(folder: Path) -> list[Path]:
    """Folders in a folder, sorted, without hidden ones and those that archivers leave (__MACOSX)."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))
    except PermissionError:
        return []


def _find_root(folder: Path, depth: int = 3) -> Path:
    """The one folder that holds a split folder: `folder` or up to `depth` levels below (ADNI/AD_NC/train)."""
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; give the folder that holds train/")
    if not folder.is_dir():
        raise DataError(f"{folder}: neither a folder nor a zip file; give the folder that holds train/")
    level = [folder]
    for _ in range(depth + 1):
        found = [f for f in level if any((f / split).is_dir() for split in SPLITS)]
        if len(found) > 1:
            raise DataError(f"{folder}: holds several data sets; give one, such as {found[0]} or {found[1]}")
        if found:
            return found[0]
        level = [sub for f in level for sub in _subfolders(f)]
    raise DataError(f"{folder}: there is no train/ folder in it; give the folder that holds train/AD")


def _scan_split(scan: FolderListing, folder: Path, split: str, class_names: Sequence[str]) -> None:
    """Adds the files, problems and notes of one split folder to `scan`."""
    metadata = _read_metadata(scan, folder / "metadata.csv")
    known = {name: label for label, cls in enumerate(class_names) for name in _ALIASES.get(cls, (cls,))}
    for class_folder in _subfolders(folder):
        if class_folder.name not in known:
            scan.notes.append(f"{class_folder}: none of the classes {', '.join(class_names)}; it is not read")
            metadata = {
                name: row for name, row in metadata.items() if Path(name).parts[0] != class_folder.name
            }
            continue
        label, others = known[class_folder.name], 0
        for entry in sorted(os.scandir(class_folder), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if not entry.name.lower().endswith(IMAGE_SUFFIXES) or entry.is_dir():
                others += 1
                continue
            row = metadata.pop(os.path.join(class_folder.name, entry.name), {})
            _scan_file(scan, Path(entry.path), split, label, row, class_names)
        if others:
            scan.notes.append(f"{class_folder}: {others} files or folders are no images; they are not read")
    for name in metadata:
        scan.problems.append(f"{folder / name}: in metadata.csv and not there; restore it or remove its row")


def _scan_file(
    scan: FolderListing,
    path: Path,
    split: str,
    label: int,
    row: Mapping[str, str],
    class_names: Sequence[str],
) -> None:
    """Adds one image to `scan`. `row` is its line of metadata.csv, empty where it has none."""
    try:
        size = path.stat().st_size
    except OSError as error:  # a link to nowhere; the datasets library would leave it out without a word
        scan.problems.append(f"{path}: cannot be read ({error.strerror}); restore or remove it")
        return
    if size == 0:
        scan.problems.append(f"{path}: the file is empty (0 bytes); copy it again or remove it")
        return

    match = _NAME.fullmatch(path.stem)
    subject = row.get("subject") or (match["subject"] if match else None)
    number = row.get("slice") or (match["slice"] if match else "")
    if subject is None:
        scan.problems.append(f"{path}: no subject in its name; rename it SUBJECT_SLICE, such as 218391_78")
    elif not number.isdecimal():
        scan.problems.append(f"{path}: slice {number!r} is no whole number; correct it in metadata.csv")
    cls = class_names[label]
    told = row.get("label") or cls
    if told not in (*_ALIASES.get(cls, (cls,)), str(label)):
        scan.problems.append(f"{path}: lies in {path.parent.name}/ but metadata.csv says {told}; correct one")
    slice_number = int(number) if number.isdecimal() else None
    # Two visits of one person are two scans; where metadata.csv is silent the name before _ is the scan.
    visit = f"{subject}/{row['session']}" if row.get("session") else None
    one_scan = row.get("image_id") or visit or (match["subject"] if match else subject)
    if subject is not None and not row.get("subject") and _IMAGE_ID.fullmatch(subject):
        scan.subjects_known = False
    age = row.get("age") or ""
    age = float(age) if re.fullmatch(r"\d+(\.\d*)?", age) else None
    scan.files.append(SliceFile(path.as_posix(), split, label, subject, slice_number, one_scan, size, age))


def _name_persons(scan: FolderListing, persons: Mapping[str, Person]) -> None:
    """Puts the person of the study table in the place of each file's subject."""
    unknown: set[str] = set()
    for index, file in enumerate(scan.files):
        if file.scan is None:
            continue
        person = persons.get(image_key(file.scan))
        if person is None:
            unknown.add(file.scan)
            continue
        age = file.age if person.age is None else person.age
        scan.files[index] = dataclasses.replace(file, subject=person.subject, age=age)
    scan.subjects_known = not unknown
    if unknown:
        scan.problems.append(
            f"{scan.table}: has no row for {_count(unknown, 'scan')} of {scan.root} ({_first(unknown)}); "
            "give a table of the whole study"
        )


def _first(names: Iterable[str], most: int = 10) -> str:
    """The first names in order: "a, b, c, ..."."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _read_metadata(scan: FolderListing, path: Path) -> dict[str, dict[str, str]]:
    """Rows of a metadata.csv by file name, all text so that subject 007 stays so; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        scan.problems.append(f"{path}: not a CSV file in UTF-8 ({error}); write it anew or remove it")
        return {}
    if rows and "file_name" not in rows[0]:
        scan.problems.append(f"{path}: has no column file_name; add it, with paths such as AD/218391_78.png")
        return {}
    return {os.path.normpath(row["file_name"]): row for row in rows}


def _report_empty_classes(scan: FolderListing, folder: Path, split: str, class_names: Sequence[str]) -> None:
    filled = {f.label for f in scan.files if f.split == split}
    for label, cls in enumerate(class_names):
        if label not in filled:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            scan.problems.append(f"{folder / cls}: no images of class {cls}; put some there ({suffixes})")


def _report_shared_subjects(scan: FolderListing) -> None:
    by_split = {s: {f.subject for f in scan.files if f.split == s and f.subject is not None} for s in SPLITS}
    scans: dict[str, set[str]] = {}
    for file in scan.files:
        if file.scan != file.subject:
            scans.setdefault(file.subject, set()).add(file.scan)
    for (a, b), names in shared_subjects(by_split).items():
        told = [f"{name}: scans {_first(scans[name])}" if name in scans else name for name in names]
        scan.problems.append(
            f"{scan.root}: {a} and {b} share {_count(names, 'subject')} ({_first(told)}); "
            "move all images of a subject to one of them"
        )
