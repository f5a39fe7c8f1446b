"""A study's table: which column is which, which word means which group, and which rows can be used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from adni_ldm.errors import UserError

# What a column is for: the names it goes by, without case, spaces and punctuation; the first found counts.
COLUMNS = {
    "path": ("path", "file", "filename", "filepath"),
    "image_id": ("imagedataid", "imageid", "imageuid", "imgid"),
    "subject": ("subject", "subjectid", "participantid", "ptid"),
    "group": ("group", "researchgroup", "diagnosis", "dx", "label"),
    "session": ("session", "sessionid", "visit", "viscode"),
    "age": ("age", "ageatscan", "subjectage"),
    "sex": ("sex", "gender", "ptgender"),
    "modality": ("modality",),
}
GROUPS = {  # other words for a class
    "AD": ("ad", "dementia", "alzheimer", "alzheimers", "alzheimersdisease"),
    "NC": ("nc", "cn", "control", "hc", "normal", "healthy", "cognitivelynormal"),
    "MCI": ("mci", "emci", "lmci"),
}


def _plain(name) -> str:
    return re.sub(r"[\W_]", "", str(name)).lower()


def _read_text_table(path: Path) -> pd.DataFrame:
    try:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a table in UTF-8, .csv or .tsv ({reason})") from error
    return table.apply(lambda column: column.str.strip())


def has_path_column(table: str | Path | None, columns: Mapping[str, str] | None) -> bool:
    if table is None or not Path(table).is_file():
        return False
    names = {_plain(name) for name in _read_text_table(Path(table)).columns}
    return "path" in (columns or {}) or bool(names & set(COLUMNS["path"]))


def read_table(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """The columns of COLUMNS that a table has, as text, without "n/a"; `years` is the age as a number."""
    table = _read_text_table(path)
    if unknown := sorted(set(columns) - set(COLUMNS)):
        raise UserError(f"--columns {unknown[0]}=…: there is {', '.join(COLUMNS)}")
    rows = {}
    for purpose, names in COLUMNS.items():
        named = columns.get(purpose)
        if named is not None and named not in table:
            raise UserError(f"{path}: no column {named!r}; it has {', '.join(table.columns)}")
        found = [named] if named else [c for name in names for c in table.columns if _plain(c) == name]
        if found:
            rows[purpose] = table[found[0]].mask(table[found[0]].str.lower().isin(["n/a", "na", "nan"]), "")
        elif purpose in ("subject", "group"):
            raise UserError(
                f"{path}: no column for the {purpose} among {', '.join(table.columns)}; "
                f"name it with --columns {purpose}=NAME"
            )
    rows = pd.DataFrame(rows).drop_duplicates()
    for optional in ("session", "age", "sex"):
        if optional not in rows:
            rows[optional] = ""
    rows["years"] = pd.to_numeric(rows.age, errors="coerce")
    rows["sex"] = rows.sex.str[:1].str.upper()  # male, F, Female ...
    return rows


def to_class(group: str, classes: Sequence[str]) -> str:
    """The class that a table's word for a group means: of `classes`, else of GROUPS, else the word itself."""
    plain = _plain(group)
    for name in classes:  # EMCI asked for by its name is not MCI
        if plain == _plain(name):
            return name
    for name, words in GROUPS.items():
        if plain in words:
            return next((c for c in classes if _plain(c) in words), name)
    return group


def classify(rows: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The rows with `label` and `use`: yes, no (another class, no MRI), or why they are rejected."""
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


def left_out_notes(rows: pd.DataFrame, classes: Sequence[str]) -> list[str]:
    left_out = rows[rows.use == "no"]
    others = left_out[~left_out.label.isin(classes)]
    notes = (
        [f"{len(others)} rows of other classes ({_tally(others.label)}); see --classes"]
        if len(others)
        else []
    )
    if no_mri := len(left_out) - len(others):
        notes.append(f"{no_mri} rows that are no MRI")
    return [f"{note}: left out" for note in notes]


def _tally(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).most_common(5))
