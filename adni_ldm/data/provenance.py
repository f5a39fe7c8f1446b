"""Provenance of a model: the data that it was trained on, and the check for data leakage.

A model's config has, under `_trained_on`, a record for each data set that it was trained on:

    {"hash": …, "hash_of": …}                 identity of the data
    {"ids": …, "slices": …, "prepared": …}    its training subjects, some slices of each, their preparation

(diffusers keeps config entries that begin with an underscore, and does not warn about them.) The ids are
salted hashes of names and answer "was this subject trained on?" for a given name without listing names. They
are not secret: whoever tries all possible names finds those of the training set. The slices are hashes of
pixels and answer it where a subject has two names, and where subjects of two studies have the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from adni_ldm.data.duplicates import content_hash
from adni_ldm.data.folder import FolderListing
from adni_ldm.data.manifest import data_hash, read_manifest
from adni_ldm.data.names import is_unique
from adni_ldm.data.slices import read_image, to_grey
from adni_ldm.data.splits import DataError
from adni_ldm.files import read_json

PARTS = ("vae", "unet", "class_embedding")  # of a pipeline; each may have a history of its own
_SPLITTING = ("classes", "val_fraction", "test_fraction", "test_subjects")  # settings that change no pixel
_SLICES = 4  # of each training subject that a record has: those whose hashes are smallest, in any split


@dataclass(frozen=True)
class DataRecord:
    """Identity of a data set and the subjects of its splits."""

    hash: str  # 64 hex digits
    hash_of: str  # what the hash covers
    class_names: tuple[str, ...]
    subjects_known: bool  # False: scans stand for subjects, and a subject may have several
    subjects: Mapping[str, Mapping[str, set[str]]]  # split: subject: names of their scans
    slices: Mapping[str, Mapping[str, set[str]]] = field(default_factory=dict)  # split: subject: pixel hashes
    prepared: str = ""  # equal where the same scan gives the same pixels: a hash of sizes and settings


def describe_data(listing: FolderListing, splits: Mapping[str, Dataset]) -> DataRecord:
    """Describe a folder and the splits that `read_slices` made of it.

    Every slice is decoded once; the result is cached by Hugging Face.
    """
    subjects: dict[str, dict[str, set[str]]] = {}
    slices: dict[str, dict[str, set[str]]] = {}
    sizes: set[str] = set()
    for split, dataset in splits.items():
        names, pixels = subjects.setdefault(split, {}), slices.setdefault(split, {})
        hashed = dataset.cast_column("image", Image(decode=False)).map(
            _hash_batch, batched=True, batch_size=100, remove_columns=["image"], desc="Hashing slices"
        )
        sizes |= set(hashed["size"][:])
        columns = (hashed[name][:] for name in ("subject", "scan", "pixels"))
        for subject, scan, digest in zip(*columns, strict=True):
            names.setdefault(subject, set()).add(scan)
            pixels.setdefault(subject, set()).update([digest] if digest else [])
    settings = (read_manifest(listing.root) or {}).get("settings", {})
    settings = {name: value for name, value in settings.items() if name not in _SPLITTING}
    prepared = hashlib.sha256(json.dumps([sorted(sizes), settings], sort_keys=True).encode()).hexdigest()[:16]
    known = tuple(listing.class_names), listing.subjects_known
    return DataRecord(*data_hash(listing), *known, subjects, slices, prepared)


def _hash_batch(batch: Mapping[str, list]) -> dict[str, list[str]]:
    """Hash of the pixels, and size, of each image; no hash of a constant one, which many subjects have."""
    found: dict[str, list[str]] = {"pixels": [], "size": []}
    for image in batch["image"]:
        grey = to_grey(read_image(image["path"]))
        low, high = grey.getextrema()
        found["pixels"].append(content_hash(grey).hex() if high > low else "")
        found["size"].append(f"{grey.width} x {grey.height}")
    return found


def training_records(data: DataRecord, earlier: Iterable[Mapping] | None = None) -> list[dict]:
    """Return the records of a model trained on `data`, after those of the model it started from."""
    names = {name for subject, scans in data.subjects["train"].items() for name in (subject, *scans)}
    record = {"hash": data.hash, "hash_of": data.hash_of, "ids": _join_hashes(names, data.hash)}
    record |= {} if data.subjects_known else {"subjects": "unknown"}
    some = {digest for every in data.slices.get("train", {}).values() for digest in sorted(every)[:_SLICES]}
    if some:
        record |= {"slices": _join_hashes(some, data.hash), "prepared": data.prepared}
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


def was_trained_on(records: Iterable[Mapping], names: Iterable[str]) -> bool:
    """Whether a record has a subject or scan of one of these names."""
    return any(_hashed(name, record["hash"]) in record["ids"].split() for record in records for name in names)


def check_leakage(model: str, records: Sequence[Mapping] | None, data: DataRecord) -> None:
    """Check that `model`, whose config has `records`, was not trained on val or test subjects of `data`.

    Compares the pixels of slices, and the names of subjects and scans, so that leakage is found in a model
    trained without the study table too. A name that many studies use (001) counts where it is of the same
    data, or the pixels cannot be compared: the record has none, or the data were prepared in another way. A
    model without records (from elsewhere, or an old one) passes: its training data are unknown.

    Raises:
        DataError: data leakage; the message names the subjects, and says what was compared.
    """
    for record in records or ():
        for split in ("test", "val"):
            found = {
                "the pixels of their slices": _same_slices(record, data, split),
                "their names": _same_names(record, data, split),
            }
            if leaked := sorted(set.union(*found.values())):
                listed = ", ".join(leaked[:10]) + (", ..." if len(leaked) > 10 else "")
                compared = " and ".join(how for how, subjects in found.items() if subjects)
                other = not found["the pixels of their slices"] and record["hash"] != data.hash
                prefix = (
                    "; if these are other people, give the subjects of one study a prefix" if other else ""
                )
                raise DataError(
                    f"{model}: was trained on {len(leaked)} of the {split} subjects of the data at hand "
                    f"({listed}), by {compared}; train it on this data's train split, or give the data, "
                    f"--table and --val_fraction that it was trained with{prefix}"
                )


def _same_slices(record: Mapping, data: DataRecord, split: str) -> set[str]:
    """Subjects of a split with a slice that is among the record's."""
    known = set(record.get("slices", "").split())
    return {
        subject
        for subject, slices in data.slices.get(split, {}).items()
        if known and any(_hashed(digest, record["hash"]) in known for digest in slices)
    }


def _same_names(record: Mapping, data: DataRecord, split: str) -> set[str]:
    """Subjects of a split with a name of the record's, unless it is a common one and pixels were compared."""
    known = set(record["ids"].split())
    by_pixels = record["hash"] != data.hash and record.get("slices") and record["prepared"] == data.prepared
    return {
        subject
        for subject, scans in data.subjects.get(split, {}).items()
        if any(
            _hashed(name, record["hash"]) in known and (is_unique(name) or not by_pixels)
            for name in (subject, *scans)
        )
    }


def _join_hashes(names: Iterable[str], salt: str) -> str:
    return " ".join(sorted(_hashed(name, salt) for name in names))  # in one string: one line of JSON


def _hashed(name: str, salt: str) -> str:
    return hashlib.sha256(f"{salt}\0{name}".encode()).hexdigest()[:16]
