"""Which person a scan is of, from the archive's study table.

The JPEG set names its files IMAGEID_SLICE, and one person may have several image IDs. ADNI's CSV has a row an
image, with the columns Image Data ID (I218391), Subject (002_S_0413) and, among others, Age.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from adni_ldm.errors import UserError

_COLUMNS = {  # what a column may be called, in lower case with spaces and underscores left out
    "image": ("imagedataid", "imageid", "imageuid", "image"),
    "subject": ("subject", "subjectid", "ptid"),
    "age": ("age",),
}


@dataclass(frozen=True)
class Person:
    """Whom a scan is of. `age` in years, None where the table does not tell."""

    subject: str
    age: float | None = None


def image_key(image_id: str) -> str:
    """An image ID without the leading I that the archive writes and file names leave out: I218391, 218391."""
    return re.sub(r"^[Ii](?=\d)", "", image_id.strip())


def read_persons(path: str | Path) -> dict[str, Person]:
    """{image ID as `image_key` gives it: person} of a study table, CSV or TSV.

    Raises UserError for a file that is no such table, or that gives one image to two persons.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"--table {path}: no such file; give the archive's CSV")
    try:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = pd.read_csv(path, sep=separator, dtype=str, encoding="utf-8-sig", skipinitialspace=True)
    except (OSError, ValueError, pd.errors.ParserError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--table {path}: no table that can be read ({reason}); save it as CSV") from error
    plain = {re.sub(r"[\s_]", "", str(column)).lower(): column for column in rows.columns}
    column = {key: next((plain[n] for n in names if n in plain), None) for key, names in _COLUMNS.items()}
    for key, usual in (("image", "Image Data ID"), ("subject", "Subject")):
        if column[key] is None:
            there = ", ".join(map(str, rows.columns))
            raise UserError(f"--table {path}: no column {usual}; it has {there}")
    return _persons(rows, column, path)


def _persons(rows: pd.DataFrame, column: dict[str, str | None], path: Path) -> dict[str, Person]:
    rows = rows.dropna(subset=[column["image"], column["subject"]])
    ages = (
        pd.to_numeric(rows[column["age"]], errors="coerce") if column["age"] else [float("nan")] * len(rows)
    )
    persons: dict[str, Person] = {}
    for image, subject, age in zip(rows[column["image"]], rows[column["subject"]], ages, strict=True):
        person = Person(subject.strip(), None if pd.isna(age) else float(age))
        other = persons.setdefault(image_key(image), person)
        if other.subject != person.subject:
            raise UserError(
                f"--table {path}: image {image} is of {other.subject} and of {person.subject}; correct one"
            )
    return persons
