"""What a model was trained on, and whether that leaks into what is held out now.

A model's config carries, under `_trained_on`, a record for each data set that it has seen:

    {"hash": …, "hash_of": …, "ids": …}       identity of the data; its training subjects, each a salted hash

(diffusers keeps config entries that begin with an underscore, and says nothing about them.) The ids answer
"was this subject trained on?" for somebody who holds the name, and print no name. They are no secret: who
tries all the names that there could be will find those that are in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset

from adni_ldm.data.folder import FolderListing
from adni_ldm.data.manifest import data_hash
from adni_ldm.data.splits import DataError


@dataclass(frozen=True)
class DataRecord:
    """Identity of a data set and who is in which of its splits."""

    hash: str  # 64 hex digits
    hash_of: str  # what it is taken over
    class_names: tuple[str, ...]
    subjects_known: bool  # no: a subject is a scan's number, and may be one of several of a person
    subjects: Mapping[str, Mapping[str, set[str]]]  # split: subject: names of their scans


def describe_data(scan: FolderListing, splits: Mapping[str, Dataset]) -> DataRecord:
    """The record of a folder and of the splits that `read_slices` made of it."""
    subjects: dict[str, dict[str, set[str]]] = {}
    for split, dataset in splits.items():
        members = subjects.setdefault(split, {})
        for subject, one in zip(dataset["subject"][:], dataset["scan"][:], strict=True):
            members.setdefault(subject, set()).add(one)
    return DataRecord(*data_hash(scan), tuple(scan.class_names), scan.subjects_known, subjects)


def training_records(data: DataRecord, earlier: Iterable[Mapping] | None = None) -> list[dict]:
    """The records for the config of a model trained on `data`, after those of what it started from."""
    names = {name for subject, scans in data.subjects["train"].items() for name in (subject, *scans)}
    ids = " ".join(sorted(_hashed(name, data.hash) for name in names))  # in one string: one line of JSON
    record = {"hash": data.hash, "hash_of": data.hash_of, "ids": ids}
    return [*(dict(one) for one in earlier or () if one != record), record]


def check_leakage(model: str, records: Sequence[Mapping] | None, data: DataRecord) -> None:
    """Raise DataError if `model`, whose config holds `records`, was trained on whom `data` holds out.

    Compares subjects and scans, so that a model trained without the study table is caught by its scans. A
    model without records (none of ours, or an old one) passes: nothing is known about it.
    """
    for record in records or ():
        known = set(record["ids"].split())
        for split in ("test", "val"):
            leaked = sorted(
                subject
                for subject, scans in data.subjects.get(split, {}).items()
                if any(_hashed(name, record["hash"]) in known for name in (subject, *scans))
            )
            if leaked:
                listed = ", ".join(leaked[:10]) + (", ..." if len(leaked) > 10 else "")
                raise DataError(
                    f"{model}: was trained on {len(leaked)} of the {split} subjects of the data at hand "
                    f"({listed}); train it on this data's train split, or give the data, --table and "
                    "--val_fraction that it was trained with"
                )


def _hashed(name: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest()[:16]
