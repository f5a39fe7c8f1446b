"""The layout of a data folder, its subjects, and its problems.

A folder is {train,val,test}/{AD,NC}/SUBJECT_SLICE.png (or .jpeg, .tif ...). Each split folder may hold a
metadata.csv, whose columns file_name, subject, image_id and slice override the file names. `list_folder` is
the only reader of this layout: `load_slices` raises its problems, `check_folder` reports them.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from adni_ldm.data.cells import unescape
from adni_ldm.data.names import image_id, parse_name
from adni_ldm.data.splits import SPLITS, DataError, shared_subjects
from adni_ldm.data.study_table import image_key, index_by_image, read_table

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
# For PIL, which would start Ghostscript for PostScript.
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_ALIASES = {"val": ("val", "validation", "valid"), "NC": ("NC", "CN")}  # other names of a folder

SUBJECTS_UNKNOWN = (
    "scans or slices are identified, and not who is on them; a subject may have several: whether two splits "
    "share a subject cannot be known; give the study table with --table, or a column subject in metadata.csv"
)


@dataclass(frozen=True)
class SliceFile:
    """One image file. `subject` and `slice` are None if neither the name nor metadata.csv has them."""

    path: str  # absolute, with forward slashes
    split: str  # train, val or test
    label: int  # index into class_names
    subject: str | None
    slice: int | None
    scan: str | None = None  # image ID, or another name of the scan; None if the subject is None
    size: int = 0  # bytes
    age: float | None = None  # years
    conditions: Mapping[str, str] = field(default_factory=dict, hash=False)  # by name; "" where missing


@dataclass
class FolderListing:
    """The contents of a data folder, by names and sizes; no image is decoded."""

    root: Path  # the folder that holds train/
    class_names: Sequence[str] = ()
    table: str | Path | None = None  # study table that the subjects are from
    subjects_known: bool = True  # False where scans stand for subjects
    conditions: Sequence[str] = ()  # columns that the files' conditions are of
    columns: set[str] = field(default_factory=set)  # of metadata.csv and the study table
    files: list[SliceFile] = field(default_factory=list)
    problems: list[str] = field(
        default_factory=list
    )  # each names a path and what to do; they prevent training
    notes: list[str] = field(default_factory=list)  # these do not prevent training

    def raise_problems(self) -> None:
        """Raise DataError with the first problem and the number of the others, if there are any."""
        if self.problems:
            others = len(self.problems) - 1
            more = f" ({others} more: python prepare_data.py check {self.root})" if others else ""
            raise DataError(self.problems[0] + more)


def list_folder(
    data_dir: str | Path,
    class_names: Sequence[str],
    table: str | Path | None = None,
    conditions: Sequence[str] = (),
) -> FolderListing:
    """List every image of a data folder with its split, label, subject and slice, and the folder's problems.

    Nothing is written and no image is decoded.

    Args:
        data_dir: the folder that holds train/, or a parent of it.
        table: the study table, in which image IDs (the name before _, or image_id of metadata.csv) are looked
            up to find their subjects.
        conditions: columns of metadata.csv or of the study table, which counts where both have a value.

    Raises:
        UserError: the folder or the table is missing, or the table has no image IDs or subjects; or there is
            no column of a condition.
    """
    rows = read_table(table, required=("image_id", "subject"), others=conditions) if table else None
    root = _find_root(Path(os.path.abspath(os.path.expanduser(data_dir))))
    listing = FolderListing(root, tuple(class_names), table, conditions=tuple(conditions))
    for split in SPLITS:
        folders = [
            listing.root / name for name in _ALIASES.get(split, (split,)) if (listing.root / name).is_dir()
        ]
        if folders:
            for folder in folders:
                _list_split(listing, folder, split, class_names)
            _report_empty_classes(listing, folders[0], split, class_names)
        elif split == "train":
            listing.problems.append(
                f"{listing.root}: there is no train/ folder; put train/AD and train/NC there"
            )
        else:
            then = "subjects of train are used" if split == "val" else "it is not needed for training"
            listing.notes.append(f"{listing.root}: there is no {split}/ folder; {then}")
    if rows is not None:
        _apply_table(listing, rows[rows.subject != ""])
    elif not listing.subjects_known:
        listing.notes.append(f"{listing.root}: {SUBJECTS_UNKNOWN}")
    if absent := [name for name in conditions if name not in listing.columns]:
        known = ", ".join(sorted(listing.columns - {"file_name"})) or "none"
        raise DataError(
            f"--conditions {absent[0]}: no such column in metadata.csv or the study table; there are: {known}"
        )
    _rename_shared_scans(listing)
    _report_shared_subjects(listing)
    return listing


def classes_in(data_dir: str | Path) -> tuple[str, ...]:
    """List the class folders of a data folder, sorted, with CN as NC. Raises DataError without a folder."""
    root = _find_root(Path(os.path.abspath(os.path.expanduser(data_dir))))
    folders = [root / name for split in SPLITS for name in _ALIASES.get(split, (split,))]
    names = {sub.name for folder in folders if folder.is_dir() for sub in _subfolders(folder)}
    class_of = {alias: cls for cls, aliases in _ALIASES.items() for alias in aliases}
    return tuple(sorted({class_of.get(name, name) for name in names}))


def _subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and those of archivers (__MACOSX)."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))
    except PermissionError:
        return []


def _find_root(folder: Path, depth: int = 3) -> Path:
    """Find the folder of the splits: `folder`, or one up to `depth` levels below (ADNI/AD_NC/train)."""
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; give the folder that holds train/")
    if not folder.is_dir():
        raise DataError(f"{folder}: neither a folder nor a zip file; give the folder that holds train/")
    level = [folder]
    for _ in range(depth + 1):
        found = [f for f in level if any((f / split).is_dir() for split in SPLITS)]
        if len(found) > 1:
            raise DataError(
                f"{folder}: holds several data sets; choose one, such as {found[0]} or {found[1]}"
            )
        if found:
            return found[0]
        level = [sub for f in level for sub in _subfolders(f)]
    raise DataError(f"{folder}: there is no train/ folder in it; give the folder that holds train/AD")


def _list_split(listing: FolderListing, folder: Path, split: str, class_names: Sequence[str]) -> None:
    """Add the files, problems and notes of one split folder to `listing`."""
    metadata = _read_metadata(listing, folder / "metadata.csv")
    known = {name: label for label, cls in enumerate(class_names) for name in _ALIASES.get(cls, (cls,))}
    for class_folder in _subfolders(folder):
        if class_folder.name not in known:
            listing.notes.append(
                f"{class_folder}: not one of the classes {', '.join(class_names)}; it is ignored"
            )
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
            _list_file(listing, Path(entry.path), split, label, row, class_names)
        if others:
            listing.notes.append(
                f"{class_folder}: {others} files or folders are not images; they are ignored"
            )
    for name in metadata:
        listing.problems.append(
            f"{folder / name}: is in metadata.csv but missing; restore it or remove its row"
        )


def _list_file(
    listing: FolderListing,
    path: Path,
    split: str,
    label: int,
    row: Mapping[str, str],
    class_names: Sequence[str],
) -> None:
    """Add one image to `listing`. `row` is its row of metadata.csv, {} without one."""
    try:
        size = path.stat().st_size
    except OSError as error:  # a broken link, which the datasets library would skip silently
        listing.problems.append(f"{path}: cannot be read ({error.strerror}); restore or remove it")
        return
    if size == 0:
        listing.problems.append(f"{path}: the file is empty (0 bytes); copy it again or remove it")
        return

    name = parse_name(path.stem)
    subject = row.get("subject") or name.subject
    number = row.get("slice") or name.slice
    if subject is None:
        listing.problems.append(f"{path}: no subject in its name; rename it SUBJECT_SLICE, such as 218391_78")
    elif not number.isdecimal():
        listing.problems.append(f"{path}: slice {number!r} is not a whole number; correct it in metadata.csv")
    cls = class_names[label]
    written = row.get("label") or cls
    if written not in (*_ALIASES.get(cls, (cls,)), str(label)):
        where = path.parent.name
        listing.problems.append(
            f"{path}: is in {where}/ but has label {written} in metadata.csv; correct one"
        )
    slice_number = int(number) if number.isdecimal() else None
    # Two visits of a subject are two scans; without either in metadata.csv, the name has the scan.
    visit = f"{subject}/{row['session']}" if row.get("session") else None
    scan_id = row.get("image_id") or visit or name.scan or subject
    if subject is not None and not row.get("subject") and not name.subject_known:
        listing.subjects_known = False
    age = row.get("age") or ""
    age = float(age) if re.fullmatch(r"\d+(\.\d*)?", age) else None
    known = {name: _plain_value(row.get(name)) for name in listing.conditions}
    listing.files.append(
        SliceFile(path.as_posix(), split, label, subject, slice_number, scan_id, size, age, known)
    )


def _plain_value(text: str | None) -> str:
    """A cell without spaces around it, "" where it says that the value is missing."""
    text = (text or "").strip()
    return "" if text.lower() in ("n/a", "na", "nan") else text


def _apply_table(listing: FolderListing, rows: pd.DataFrame) -> None:
    """Replace each file's subject, and its age and conditions where known, by that of the study table."""
    by_image = index_by_image(rows, listing.table)
    named = {name: rows[name].to_dict() for name in listing.conditions if name in rows}
    listing.columns |= set(rows.columns)
    subjects, ages = rows.subject.to_dict(), rows.years.to_dict()
    unknown: set[str] = set()
    for position, file in enumerate(listing.files):
        if file.scan is None:
            continue
        index = by_image.get(image_key(image_id(file.scan)))
        if index is None:
            unknown.add(file.scan)
            continue
        age = file.age if math.isnan(ages[index]) else float(ages[index])
        given = {name: _plain_value(column[index]) for name, column in named.items()}
        given = {**file.conditions, **{name: value for name, value in given.items() if value}}
        listing.files[position] = dataclasses.replace(
            file, subject=subjects[index], age=age, conditions=given
        )
    listing.subjects_known = not unknown
    if unknown:
        listing.problems.append(
            f"{listing.table}: has no row for {_count(unknown, 'scan')} of {listing.root} "
            f"({_first(unknown)}); give the table of the whole study"
        )


def _rename_shared_scans(listing: FolderListing) -> None:
    """Let the subject stand for a scan whose name several have: all files of a folder may be img_0001.png."""
    owners: dict[str | None, set[str | None]] = {}
    for file in listing.files:
        owners.setdefault(file.scan, set()).add(file.subject)
    for position, file in enumerate(listing.files):
        if len(owners[file.scan]) > 1:
            listing.files[position] = dataclasses.replace(file, scan=file.subject)


def _first(names: Iterable[str], most: int = 10) -> str:
    """The first names in order: "a, b, c, ..."."""
    names = sorted(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'s' * (len(things) != 1)}"


def _read_metadata(listing: FolderListing, path: Path) -> dict[str, dict[str, str]]:
    """Rows of a metadata.csv by file name, as text (subject 007 stays 007); {} without a file."""
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        listing.problems.append(f"{path}: not a CSV file in UTF-8 ({error}); write it anew or remove it")
        return {}
    listing.columns |= {name for name in rows[0] if name} if rows else set()
    if rows and "file_name" not in rows[0]:
        listing.problems.append(
            f"{path}: has no column file_name; add it, with paths such as AD/218391_78.png"
        )
        return {}
    nameless = [line for line, row in enumerate(rows, start=2) if not row["file_name"]]
    if nameless:
        listing.problems.append(
            f"{path}: row {nameless[0]} has no file_name (of {_count(nameless, 'such row')}); "
            "add the path of its image, or remove the row"
        )
    return {
        os.path.normpath(row["file_name"]): {name: unescape(value) for name, value in row.items()}
        for row in rows
        if row["file_name"]
    }


def _report_empty_classes(
    listing: FolderListing, folder: Path, split: str, class_names: Sequence[str]
) -> None:
    filled = {f.label for f in listing.files if f.split == split}
    for label, cls in enumerate(class_names):
        if label not in filled:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            listing.problems.append(f"{folder / cls}: no images of class {cls}; put some there ({suffixes})")


def _report_shared_subjects(listing: FolderListing) -> None:
    by_split = {
        s: {f.subject for f in listing.files if f.split == s and f.subject is not None} for s in SPLITS
    }
    scans: dict[str, set[str]] = {}
    for file in listing.files:
        if file.scan != file.subject:
            scans.setdefault(file.subject, set()).add(file.scan)
    for (a, b), names in shared_subjects(by_split).items():
        listed = [f"{name}: scans {_first(scans[name])}" if name in scans else name for name in names]
        listing.problems.append(
            f"{listing.root}: {a} and {b} share {_count(names, 'subject')} ({_first(listed)}); "
            "move all images of a subject to one of them"
        )
