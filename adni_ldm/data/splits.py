"""Who is in which split: the layout of a data folder, the subjects in it, and what is wrong with it.

A folder is {train,val,test}/{AD,NC}/SUBJECT_SLICE.png (or .jpeg, .tif ...). Each split folder may hold a
metadata.csv, whose columns file_name, subject, image_id and slice go before what the file's name says.
`scan_folder` is the only reader of this layout: `load_slices` refuses a folder with problems, `check_folder`
prints them.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pandas as pd

from adni_ldm.errors import UserError

SPLITS = ("train", "val", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
_ALIASES = {"val": ("val", "validation", "valid"), "NC": ("NC", "CN")}  # other names the same folder goes by
_NAME = re.compile(r"(?P<subject>.+)_(?P<slice>\d+)")  # 218391_78, sub-01_78, 002_S_0413_78


class DataError(UserError):
    """Data that cannot be used: one line that names the path and says what to do."""


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


@dataclass
class Scan:
    """What lies in a data folder, by names and sizes alone: no image is decoded."""

    root: Path  # the folder that holds train/
    class_names: Sequence[str] = ()
    files: list[SliceFile] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # each names a path and what to do; training is refused
    notes: list[str] = field(default_factory=list)  # worth knowing, no hindrance

    def raise_problems(self) -> None:
        """Raises DataError with the first problem, and the number of the others."""
        if self.problems:
            others = len(self.problems) - 1
            more = f" ({others} more: python prepare_data.py check {self.root})" if others else ""
            raise DataError(self.problems[0] + more)


def subject_fraction(subject: str) -> float:
    """A number in [0, 1) that depends on the subject's name alone, evenly spread over subjects.

    A subject goes to validation if it is below the validation fraction: on every machine and in every run the
    same, and unmoved when other subjects are added.
    """
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:6], "big") / 2**48  # 48 bits are exact


def choose_val_subjects(subjects_by_class: Mapping[int, Iterable[str]], fraction: float) -> set[str]:
    """The subjects to set aside for validation, about `fraction` of them, by `subject_fraction`.

    A class of two subjects or more has at least one on either side: where chance leaves a side empty, the
    subject with the smallest (for validation) or the largest number (for training) is moved there. A class of
    one subject keeps it for training.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction={fraction} must lie between 0 and 1")
    ordered = {label: sorted(set(names), key=subject_fraction) for label, names in subjects_by_class.items()}
    chosen = {name for names in ordered.values() for name in names if subject_fraction(name) < fraction}
    chosen |= {names[0] for names in ordered.values() if len(names) > 1 and not chosen.intersection(names)}
    # After the additions: a subject of two classes may have been added for one and be the last of the other.
    chosen -= {names[-1] for names in ordered.values() if names and chosen.issuperset(names)}
    return chosen


def assign_splits(
    people: pd.DataFrame,
    fractions: Mapping[str, float],
    fixed: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The split of every subject of `people`, columns subject, label, age (years or NaN) and sex (or NaN).

    A function of one subject alone cannot balance a small cohort, and a balance over all moves subjects when
    others arrive. So the earlier assignment is given as `fixed` (`manifest_splits` of the data's manifest, or
    a test set that someone else chose), is kept without exception, and only the others are placed. The same
    people, fractions and `fixed` give the same splits, whatever the order of the rows; without `fixed`,
    adding people may move some.

    Every class gets its share of each split to one subject, and one at least where it has as many subjects as
    there are splits. Within the class, each subject in turn, in the order of `subject_fraction`, goes where
    subjects of their sex and their sixth of the class by age are furthest from their share: minimization
    (Pocock & Simon 1975, doi:10.2307/2529712). `fractions` are relative: {"train": 0.7, "val": 0.15, "test":
    0.15}; a split that is not named there gets none but the fixed.

    Raises ValueError for a subject in two rows, and for fractions or fixed splits that make no sense.
    """
    fixed = dict(fixed or {})
    if unknown := sorted({*fractions, *fixed.values()} - set(SPLITS)):
        raise ValueError(f"no split {', '.join(unknown)}; there is {', '.join(SPLITS)}")
    if not fractions or any(not share > 0 for share in fractions.values()):
        raise ValueError(f"fractions={dict(fractions)}: give each split a share above 0")
    if twice := sorted(people.subject[people.subject.duplicated()].unique()):
        raise ValueError(f"subjects in two rows: {', '.join(twice[:10])}; give one row a subject")
    shares = {split: share / sum(fractions.values()) for split, share in fractions.items()}
    return {
        subject: split
        for _, members in people.groupby("label", sort=True)
        for subject, split in _assign_class(members, shares, fixed).items()
    }


def _assign_class(
    members: pd.DataFrame, shares: Mapping[str, float], fixed: Mapping[str, str]
) -> dict[str, str]:
    """`assign_splits` for the people of one class."""
    age = pd.to_numeric(members.age, errors="coerce")
    sixth = pd.qcut(age, 6, labels=False, duplicates="drop") if age.nunique() > 1 else age * 0
    strata = {
        subject: (("sex", str(sex)), ("age", str(band)))
        for subject, sex, band in zip(members.subject, members.sex, sixth, strict=True)
    }
    splits = {subject: fixed[subject] for subject in strata if subject in fixed}
    new = sorted(set(strata) - set(splits), key=lambda name: (subject_fraction(name), name))

    pool = [subject for subject in strata if subject not in splits or splits[subject] in shares]
    wanted = Counter(stratum for subject in pool for stratum in strata[subject])
    given = Counter((split, stratum) for subject, split in splits.items() for stratum in strata[subject])
    free = _places(shares, Counter(splits.values()), len(new))
    for subject in new:

        def lack(split, subject=subject):
            return sum(shares[split] * wanted[s] - given[split, s] for s in strata[subject])

        splits[subject] = max((split for split in free if free[split]), key=lack)  # a tie: the first split
        free[splits[subject]] -= 1
        given.update((splits[subject], stratum) for stratum in strata[subject])
    return splits


def _places(shares: Mapping[str, float], taken: Counter[str], count: int) -> Counter[str]:
    """How many of `count` new subjects each split gets: one at a time, to the split that lacks most.

    A split with nobody in it comes first, train before test before val.
    """
    total = sum(taken[split] for split in shares) + count
    order = sorted(shares, key=("train", "test", "val").index)
    places: Counter[str] = Counter()
    for _ in range(count):
        lacks = {split: shares[split] * total - taken[split] - places[split] for split in order}
        empty = [split for split in order if not taken[split] + places[split]]
        places[empty[0] if empty else max(order, key=lacks.__getitem__)] += 1
    return places


def shared_subjects(subjects_by_split: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], list[str]]:
    """Subjects found in two splits, sorted, for each pair of splits that shares any."""
    sets = {split: set(names) for split, names in subjects_by_split.items()}
    shared = {(a, b): sorted(sets[a] & sets[b]) for a, b in combinations(sets, 2)}
    return {pair: names for pair, names in shared.items() if names}


def scan_folder(data_dir: str | Path, class_names: Sequence[str]) -> Scan:
    """Every image of a data folder with its split, label, subject and slice, and all that is wrong by name.

    `data_dir` is the folder that holds train/, or a parent of it. Nothing is written, no image is decoded.
    Raises DataError where there is no such folder.
    """
    scan = Scan(_find_root(Path(os.path.abspath(os.path.expanduser(data_dir)))), tuple(class_names))
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


def _scan_split(scan: Scan, folder: Path, split: str, class_names: Sequence[str]) -> None:
    """Adds the files, problems and notes of one split folder to `scan`."""
    metadata = _read_metadata(scan, folder / "metadata.csv")
    known = {name: label for label, cls in enumerate(class_names) for name in _ALIASES.get(cls, (cls,))}
    for class_folder in _subfolders(folder):
        if class_folder.name not in known:
            scan.notes.append(f"{class_folder}: none of the classes {', '.join(class_names)}; it is not read")
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
    scan: Scan, path: Path, split: str, label: int, row: Mapping[str, str], class_names: Sequence[str]
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
    scan.files.append(SliceFile(path.as_posix(), split, label, subject, slice_number, one_scan, size))


def _read_metadata(scan: Scan, path: Path) -> dict[str, dict[str, str]]:
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


def _report_empty_classes(scan: Scan, folder: Path, split: str, class_names: Sequence[str]) -> None:
    filled = {f.label for f in scan.files if f.split == split}
    for label, cls in enumerate(class_names):
        if label not in filled:
            suffixes = ", ".join(IMAGE_SUFFIXES)
            scan.problems.append(f"{folder / cls}: no images of class {cls}; put some there ({suffixes})")


def _report_shared_subjects(scan: Scan) -> None:
    by_split = {s: {f.subject for f in scan.files if f.split == s and f.subject is not None} for s in SPLITS}
    for (a, b), names in shared_subjects(by_split).items():
        listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        scan.problems.append(
            f"{scan.root}: {a} and {b} share {len(names)} subject{'s' * (len(names) > 1)} ({listed}); "
            "move all images of a subject to one of them"
        )
