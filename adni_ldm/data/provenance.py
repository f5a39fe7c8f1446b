"""Provenance of a model: the data that it was trained on, and the check for data leakage.

A model's config has, under `_trained_on`, a record for each data set that it was trained on:

    {"hash": …, "hash_of": …, "ids": …}       identity of the data; its training subjects, each a salted hash

(diffusers keeps config entries that begin with an underscore, and does not warn about them.) The ids answer
"was this subject trained on?" for a given name without listing names. They are not secret: whoever tries all
possible names finds those of the training set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from adni_ldm.data.folder import FolderListing
from adni_ldm.data.manifest import data_hash
from adni_ldm.data.splits import DataError
from adni_ldm.files import read_json

PARTS = ("vae", "unet", "class_embedding")  # of a pipeline; each may have a history of its own


@dataclass(frozen=True)
class DataRecord:
    """Identity of a data set and the subjects of its splits."""

    hash: str  # 64 hex digits
    hash_of: str  # what the hash covers
    class_names: tuple[str, ...]
    subjects_known: bool  # False: scans stand for subjects, and a subject may have several
    subjects: Mapping[str, Mapping[str, set[str]]]  # split: subject: names of their scans


def describe_data(listing: FolderListing, splits: Mapping[str, Dataset]) -> DataRecord:
    """Describe a folder and the splits that `read_slices` made of it."""
    subjects: dict[str, dict[str, set[str]]] = {}
    for split, dataset in splits.items():
        members = subjects.setdefault(split, {})
        for subject, scan in zip(dataset["subject"][:], dataset["scan"][:], strict=True):
            members.setdefault(subject, set()).add(scan)
    return DataRecord(*data_hash(listing), tuple(listing.class_names), listing.subjects_known, subjects)


def training_records(data: DataRecord, earlier: Iterable[Mapping] | None = None) -> list[dict]:
    """Return the records of a model trained on `data`, after those of the model it started from."""
    names = {name for subject, scans in data.subjects["train"].items() for name in (subject, *scans)}
    ids = " ".join(sorted(_hashed(name, data.hash) for name in names))  # in one string: one line of JSON
    record = {"hash": data.hash, "hash_of": data.hash_of, "ids": ids}
    return [*(dict(entry) for entry in earlier or () if entry != record), record]


def records_by_part(model: str | Path | Mapping[str, Any]) -> dict[str, list[dict]]:
    """Read the records of each part of a model, {} of a folder without a model.

    A pipeline's parts differ where --vae or --init_from brought one in that was trained on other data.

    Args:
        model: folder of a pipeline or of an autoencoder; or the components of a loaded one, by name
            (`pipeline.components`), which serves models from the Hub too.
    """
    if isinstance(model, Mapping):
        configs = {part: model[part].config for part in PARTS if model.get(part) is not None}
    else:
        files = {part: Path(model, part, "config.json") for part in PARTS}
        files = {part: file for part, file in files.items() if file.is_file()}
        if not files and (alone := Path(model, "config.json")).is_file():
            files = {"vae": alone}
        configs = {part: read_json(file) for part, file in files.items()}
    return {
        part: [dict(entry) for entry in config.get("_trained_on") or ()] for part, config in configs.items()
    }


def model_records(model: str | Path | Mapping[str, Any]) -> list[dict]:
    """The records of all parts of a model (see `records_by_part`), each once, in the order of training."""
    found: list[dict] = []
    for records in records_by_part(model).values():
        found += [record for record in records if record not in found]
    return found


def check_leakage(model: str, records: Sequence[Mapping] | None, data: DataRecord) -> None:
    """Check that `model`, whose config has `records`, was not trained on val or test subjects of `data`.

    Compares subjects and scans, so that leakage is found in a model trained without the study table too. A
    model without records (from elsewhere, or an old one) passes: its training data are unknown.

    Raises:
        DataError: data leakage; the message names the subjects.
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
