"""The scans of a study: its files joined with its study table.

Three layouts are supported. An archive tree, as ADNI's downloads unpack, with the archive's CSV:

    ADNI/SUBJECT/DESCRIPTION/DATE/IMAGE_ID/*.nii or *.dcm    Image Data ID, Subject, Group, Sex, Age ...

BIDS, with its own participants.tsv (participant_id, group or diagnosis, age, sex):

    sub-*/[ses-*/]anat/*_T1w.nii.gz

A plain folder with a table that has a column `path`, relative to the folder, beside subject and group. Any
column may have another name: `columns={"group": "DX_bl"}`.

A subject of the table is assigned to a split whether or not a scan can be read, so adding files never moves a
subject to another split.
"""

import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from adni_ldm.data.study_table import (
    classify,
    excluded_notes,
    has_path_column,
    image_key,
    index_by_image,
    read_table,
)
from adni_ldm.errors import UserError
from adni_ldm.preprocessing.volumes import NIFTI_SUFFIXES, is_dicom

_ADNI_SUBJECT = re.compile(r"\d{3}_S_\d{4,5}")


@dataclasses.dataclass(frozen=True)
class StudyScan:
    """One scan to read. `key` is unique and begins the slices' file names; age in years; "" is unknown."""

    key: str
    path: str  # of the NIfTI file or the DICOM folder, relative to the input folder
    subject: str
    label: str
    session: str = ""
    image_id: str = ""
    age: str = ""
    sex: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A file, or a row of the table without a file (path ""), that cannot be used, with the reason."""

    path: str
    subject: str
    image_id: str
    reason: str


@dataclasses.dataclass
class Study:
    """Scans sorted by key; `subjects`, one row each: subject, label, age, sex; what is excluded."""

    scans: list[StudyScan]
    subjects: pd.DataFrame
    rejected: list[Rejected]
    notes: list[str]


def read_study(
    input_dir: str | Path,
    table: str | Path | None = None,  # None: participants.tsv of a BIDS folder
    classes: Sequence[str] = ("AD", "NC"),
    columns: Mapping[str, str] | None = None,  # {"group": "DX_bl"}: the table's names where ours do not fit
    ignore: Iterable[str] = (),  # glob patterns of files that are not scans, such as masks
) -> Study:
    """Find the scans of a folder and join them with the study table.

    Raises UserError if the folder or the table is missing, or the table as a whole cannot be used.
    """
    root = Path(input_dir)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder of the scans")
    bids = any(root.glob("sub-*")) and not has_path_column(table, columns)
    table = Path(table) if table else root / "participants.tsv"
    if not table.is_file():
        more = "" if bids else " (columns such as Image Data ID, Subject, Group, Age, Sex), with --table"
        raise UserError(f"{table}: no such file; give the study table{more}")
    rows = read_table(table, columns)
    if bids:
        rows["subject"] = "sub-" + rows.subject.str.removeprefix("sub-")
    if "path" in rows:
        rows["path"] = [Path(path).as_posix() if path else "" for path in rows.path]  # ./a.nii is a.nii
    rows = classify(rows, classes)
    usable = rows[rows.use == "yes"]
    if usable.empty:
        raise UserError(f"{table}: no row of {' or '.join(classes)}; see --classes and --columns")
    by_subject = usable.groupby("subject", as_index=False)
    subjects = by_subject.agg(label=("label", "first"), age=("years", "min"), sex=("sex", "max"))
    subjects["sex"] = subjects.sex.where(subjects.sex != "")

    files = find_scans(root, bids, ignore)
    linked, rejected = _join(root, files, rows, table)
    found = [_to_scan(path, rows.loc[index], bids) for path, index in linked]
    # A scan is stored in a folder of its key: without one, that would be the folder of all scans.
    scans = sorted((scan for scan in found if scan.key), key=lambda scan: scan.key)
    rejected += [Rejected(s.path, s.subject, s.image_id, _NO_NAME) for s in found if not s.key]
    for one, other in itertools.pairwise(scans):
        if one.key == other.key:
            raise UserError(f"{one.path} and {other.path} would write slices of the same name; move one away")
    return Study(scans, subjects, rejected, excluded_notes(rows, classes))


def find_scans(root: Path, bids: bool = False, ignore: Iterable[str] = ()) -> list[str]:
    """List the NIfTI files and the folders of DICOM files below `root`, as sorted relative paths.

    In BIDS only anat/*_T1w. Hidden names, and names that match a pattern of `ignore`, are skipped.
    """
    found = []
    for place, folders, names in os.walk(root):
        folder = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if bids and folder == root:  # derivatives/ has copies of the same names
            folders[:] = [f for f in folders if f.startswith("sub-")]
        if bids and folder.name != "anat":
            continue
        paths = [folder / name for name in sorted(names) if not name.startswith(".")]
        paths = [path for path in paths if not any(path.match(pattern) for pattern in ignore)]
        niftis = [path for path in paths if path.name.endswith(NIFTI_SUFFIXES)]
        found += [path for path in niftis if not bids or "_T1w." in path.name]
        suffixes = ((path, path.suffix.lower()) for path in paths)
        others = [path for path, s in suffixes if s in (".dcm", ".ima", "") or s[1:].isdigit()]
        if not bids and any(map(is_dicom, others[:3])):
            found.append(folder)
    return [path.relative_to(root).as_posix() for path in found]


def _join(
    root: Path, files: Sequence[str], rows: pd.DataFrame, table: Path
) -> tuple[list[tuple[str, int]], list[Rejected]]:
    """Pairs of a file and its row; and rejected files without a row, rows without a file, and bad rows."""
    if "path" in rows:
        find_row = _find_by_path(rows)
        files = sorted({*files, *(p for p in rows.path if p and (root / p).exists())})
    elif "image_id" in rows:
        find_row = _find_by_image(root, rows, table)
    else:
        find_row = _find_by_subject(rows, table)
    linked, rejected, taken = [], [], {}
    for path in files:
        index = _OUTSIDE if _leads_outside(root, path) else find_row(path)
        if isinstance(index, str):
            rejected.append(Rejected(path, "", "", index))
            continue
        row = rows.loc[index]
        reason = "" if row.use in ("yes", "no") else row.use
        if row.get("image_id") and index in taken:
            reason = reason or f"the same image as {taken[index]}"
        taken[index] = path
        if reason:
            rejected.append(Rejected(path, row.subject, row.get("image_id", ""), reason))
        elif row.use == "yes":
            linked.append((path, index))
    for index, row in rows.iterrows():
        if index not in taken and row.use != "no":
            reason = "no file for this row of the table" if row.use == "yes" else row.use
            rejected.append(Rejected(row.get("path", ""), row.subject, row.get("image_id", ""), reason))
    return linked, rejected


_NO_NAME = "its name names no subject; rename it, such as sub-01_T1w.nii.gz"
_NO_ROW = "no row of the table matches it"
_OUTSIDE = "is outside the folder of scans, by its path or by a link; move it there"


def _leads_outside(root: Path, path: str) -> bool:
    """Whether a file, a folder or a link in that folder points outside `root`: archives are untrusted."""
    full, root = root / path, root.resolve()
    inside = [Path(entry) for entry in os.scandir(full) if entry.is_symlink()] if full.is_dir() else []
    return not all(entry.resolve().is_relative_to(root) for entry in (full, *inside))


def _find_by_path(rows: pd.DataFrame):
    by_path = {}
    for index, path in rows.path.items():
        if path and by_path.setdefault(path, index) != index:
            raise UserError(f"the table has two rows for {path}; keep one")
    return lambda path: by_path.get(path, _NO_ROW)


def _find_by_image(root: Path, rows: pd.DataFrame, table: Path):
    by_image = index_by_image(rows, table)

    def find(path: str) -> int | str:
        number = _image_number(root, path)
        if number not in by_image:
            return _NO_ROW if number else "no image ID in its path, such as …/I14xxx/…"
        subject = rows.subject[by_image[number]]
        in_path = {match[0] for match in map(_ADNI_SUBJECT.search, Path(path).parts) if match}
        if in_path and _ADNI_SUBJECT.fullmatch(subject) and subject not in in_path:
            folders = ", ".join(sorted(in_path))
            return f"is in a folder of {folders}, but the table lists its image for {subject}"
        return by_image[number]

    return find


def _image_number(root: Path, path: str) -> str | None:
    """14xxx of …_I14xxx.nii, else of a folder I14xxx or 14xxx. A folder S12345 is a series, not an image."""
    full = root / path
    name = full.name if full.is_file() else next((n for n in sorted(os.listdir(full)) if n[0] != "."), "")
    if match := re.search(r"_I(\d+)(?=[._]|$)", name):
        return match[1]
    folders = Path(path).parts if full.is_dir() else Path(path).parent.parts
    numbers = map(image_key, reversed(folders))
    return next((number for number in numbers if number.isdecimal()), None)


def _find_by_subject(rows: pd.DataFrame, table: Path):
    if (repeated := rows.subject[rows.subject.duplicated()]).any():
        raise UserError(
            f"{table}: {repeated.iloc[0]} has several rows, and no column names the file of each; "
            "name one with --columns image_id=NAME or path=NAME"
        )
    by_subject = {subject: index for index, subject in rows.subject.items()}
    return lambda path: next((by_subject[p] for p in Path(path).parts if p in by_subject), _NO_ROW)


def _to_scan(path: str, row: pd.Series, bids: bool) -> StudyScan:
    name = Path(path).name
    session, image_id = row.session, row.get("image_id", "")
    if bids:
        key = name.split(".")[0].removesuffix("_T1w")
        session = session or next((p[4:] for p in Path(path).parts if p.startswith("ses-")), "")
    elif image_id:
        key = f"{row.subject}_{image_id}"
    else:  # a key that does not change when other scans are added
        key = "_".join(filter(None, [row.subject, session, hashlib.sha256(path.encode()).hexdigest()[:6]]))
    key = re.sub(r"[^\w.+-]", "-", key).lstrip(".")
    return StudyScan(key, path, row.subject, row.label, session, image_id, row.age, row.sex)
