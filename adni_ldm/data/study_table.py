"""The study table: the one reader of the CSV or TSV that lists a study's scans, subjects and diagnoses.

`read_table` finds the columns by the names that archives use, `classify` maps diagnoses to classes, and
`index_by_image` finds the row of an image ID. ADNI's CSV has one row per image: Image Data ID (I218xxx),
Subject (002_S_xxxx), Group, Sex, Age, Visit, Modality.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from adni_ldm.errors import UserError

# Purpose of a column: its names, in lower case without spaces and punctuation; the first match counts.
COLUMNS = {
    "path": ("path", "file", "filename", "filepath"),
    "image_id": ("imagedataid", "imageid", "imageuid", "imgid", "image"),
    "subject": ("subject", "subjectid", "participantid", "ptid"),
    "group": ("group", "researchgroup", "diagnosis", "dx", "label"),
    "session": ("session", "sessionid", "visit", "viscode"),
    "age": ("age", "ageatscan", "subjectage"),
    "sex": ("sex", "gender", "ptgender"),
    "modality": ("modality",),
}
GROUPS = {  # synonyms of each class
    "AD": ("ad", "dementia", "alzheimer", "alzheimers", "alzheimersdisease"),
    "NC": ("nc", "cn", "control", "hc", "normal", "healthy", "cognitivelynormal"),
    "MCI": ("mci", "emci", "lmci"),
}


def _plain(name) -> str:
    return re.sub(r"[\W_]", "", str(name)).lower()


def _read_text_table(path: Path) -> pd.DataFrame:
    try:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        options = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
        table = pd.read_csv(path, sep=separator, encoding="utf-8-sig", **options)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give the study table") from error
    except (OSError, ValueError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a table in UTF-8, .csv or .tsv ({reason})") from error
    return table.apply(lambda column: column.str.strip())


def has_path_column(table: str | Path | None, columns: Mapping[str, str] | None) -> bool:
    """Whether a study table names the file of each scan."""
    if table is None or not Path(table).is_file():
        return False
    names = {_plain(name) for name in _read_text_table(Path(table)).columns}
    return "path" in (columns or {}) or bool(names & set(COLUMNS["path"]))


def read_table(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    required: Sequence[str] = ("subject", "group"),
    others: Sequence[str] = (),
) -> pd.DataFrame:
    """Read the columns of COLUMNS that a table has, as text, with "n/a" as "".

    Args:
        columns: {purpose: name of the column}, where the table's names are not among those of COLUMNS.
        required: purposes without which the table is useless.
        others: further columns, kept under their own names where the table has them.

    Returns:
        distinct rows, always with session, age and sex (M or F); `years` is the age as a number.

    Raises:
        UserError: the file is missing or not a table, or a required or named column is not in it.
    """
    path, columns = Path(path).expanduser(), columns or {}
    table = _read_text_table(path)
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise UserError(f"--columns {unknown[0]}=…: choose from {', '.join(COLUMNS)}")
    rows = {}
    for purpose, names in COLUMNS.items():
        named = columns.get(purpose)
        if named is not None and named not in table:
            raise UserError(f"{path}: no column {named!r}; it has {', '.join(table.columns)}")
        found = [named] if named else [c for name in names for c in table.columns if _plain(c) == name]
        if found:
            rows[purpose] = table[found[0]].mask(table[found[0]].str.lower().isin(["n/a", "na", "nan"]), "")
        elif purpose in required:
            hint = f"; name it with --columns {purpose}=NAME" if "group" in required else ""
            listed = ", ".join(map(str, table.columns))
            raise UserError(f"{path}: no column for the {purpose.replace('_', ' ')} among {listed}{hint}")
    rows |= {name: table[name] for name in others if name in table and name not in rows}
    rows = pd.DataFrame(rows).drop_duplicates()
    for optional in ("session", "age", "sex"):
        if optional not in rows:
            rows[optional] = ""
    rows["years"] = pd.to_numeric(rows.age, errors="coerce")
    rows["sex"] = rows.sex.str[:1].str.upper()  # male, F, Female ...
    return rows


def to_class(group: str, classes: Sequence[str]) -> str:
    """Map a diagnosis to a class: one of `classes`, else of GROUPS, else the text itself."""
    plain = _plain(group)
    for name in classes:  # first, so that EMCI can be a class of its own
        if plain == _plain(name):
            return name
    for name, words in GROUPS.items():
        if plain in words:
            return next((c for c in classes if _plain(c) in words), name)
    return group


def classify(rows: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Add `label` and `use`: "yes", "no" (another class, not an MRI), or the reason for a rejection."""
    rows = rows.assign(label=[to_class(group, classes) for group in rows.group])
    mri = (
        rows.modality.str.upper().isin(["MRI", "MR", ""])
        if "modality" in rows
        else pd.Series(True, rows.index)
    )
    groups = rows[mri].groupby("subject").label.agg(lambda labels: sorted(set(labels) - {""}))

    def use(row) -> str:
        if not mri[row.name]:
            return "no"
        if not row.subject or not row.label:
            return f"its row of the table has no {'group' if row.subject else 'subject'}"
        if len(groups[row.subject]) > 1:
            return f"its subject has {len(groups[row.subject])} groups: {', '.join(groups[row.subject])}"
        return "yes" if row.label in classes else "no"

    return rows.assign(use=rows.apply(use, axis=1) if len(rows) else "")


def excluded_notes(rows: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    """Describe, in a line each, how many rows are of other classes and how many are not MRI."""
    excluded = rows[rows.use == "no"]
    others = excluded[~excluded.label.isin(classes)]
    notes = []
    if len(others):
        counts = ", ".join(f"{count} {label}" for label, count in Counter(others.label).most_common(5))
        notes.append(f"excluded: {len(others)} rows of other classes ({counts}); see --classes")
    if no_mri := len(excluded) - len(others):
        notes.append(f"excluded: {no_mri} rows that are not MRI")
    return notes


def image_key(image_id: str) -> str:
    """Return an image ID without the prefix that file names leave out: I218xxx and 218xxx are the same."""
    return re.sub(r"^[IiDd](?=\d)", "", image_id.strip())


def index_by_image(rows: pd.DataFrame, path: str | Path) -> dict[str, int]:
    """Map `image_key` of each image ID to the index of its first row.

    Raises:
        UserError: an image has rows with different subjects or labels; the message names `path`.
    """
    found: dict[str, tuple[int, str]] = {}  # index, subject and label
    identities = rows.subject + (", " + rows.label if "label" in rows else "")
    for index, name, identity in zip(rows.index, rows.image_id, identities, strict=True):
        if (key := image_key(name)) and found.setdefault(key, (index, identity))[1] != identity:
            raise UserError(
                f"{path}: image {name} has two rows that differ ({found[key][1]}; {identity}); correct one"
            )
    return {key: index for key, (index, _) in found.items()}
