"""The data that a model was trained on, and the folders of them that are at hand.

A model may have been trained on several cohorts one after another, its autoencoder on others than its U-Net.
Copies of slices can be found only in cohorts that are at hand; the others are listed as unseen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from adni_ldm.data.archives import open_data_dir
from adni_ldm.data.folder import classes_in
from adni_ldm.data.provenance import (
    DataRecord,
    check_leakage,
    describe_data,
    model_records,
    records_by_part,
    training_records,
)
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.errors import UserError
from adni_ldm.evaluation.image_sets import ImageSet, real_set, relabel
from adni_ldm.pipeline import ClassConditionalLDMPipeline

FLAG = "--also_trained_on"


@dataclass(frozen=True)
class History:
    """The records of the data that a model was trained on."""

    model: str  # name, for messages
    parts: Mapping[str, Sequence[Mapping]]  # part of the pipeline: its records; {} where unknown
    records: Sequence[Mapping]  # of all parts, each once
    unknown: str = ""  # why nothing is known; empty where the records are

    @property
    def hashes(self) -> list[str]:
        """Hashes of the data sets, in the order of training."""
        return list(dict.fromkeys(record["hash"] for record in self.records))

    def unseen(self, at_hand: Collection[str]) -> list[str] | None:
        """The cohorts whose hash is not `at_hand`, "3f0c12ab89ef (vae, unet)"; None: history unknown."""
        if self.unknown:
            return None
        return [
            f"{digest[:12]} ({', '.join(p for p, own in self.parts.items() if _lists(own, digest))})"
            for digest in self.hashes
            if digest not in at_hand
        ]

    def describe(self, unseen: Sequence[str] | None) -> str:
        """The model's training data in a line of the report."""
        if unseen is None:
            return f"unknown: {self.unknown}"
        listed = ", ".join(digest[:12] for digest in self.hashes)
        if not unseen:
            return f"data hashes {listed}; copies were searched for in all of them"
        return f"data hashes {listed}; not at hand: {'; '.join(unseen)}; give their folders with {FLAG}"


@dataclass(frozen=True)
class Cohort:
    """A data set that the model was trained on, beside the real slices."""

    folder: str
    data: DataRecord
    train: ImageSet  # its training slices; label -1 where the class is not one of the evaluation's


def sampled_with(table: pd.DataFrame) -> dict[str, str]:
    """Model, data and settings in a table of `read_sample_table`, a column's values joined."""
    columns = ("model", "model_hash", "data_hash")
    columns += ("guidance_scale", "num_inference_steps", "eta", "scheduler")
    return {name: ", ".join(sorted(set(table[name]))) for name in columns if name in table}


def read_history(name: str, pipeline: ClassConditionalLDMPipeline | None, reason: str = "") -> History:
    """The history of a loaded pipeline, from the configs of its parts; unknown for `reason` without one."""
    parts = records_by_part(pipeline.components) if pipeline else {}
    if pipeline and not parts.get("unet"):
        reason = "the model has no record of them"
    return History(name, parts, model_records(pipeline.components) if pipeline else [], reason)


def open_cohorts(
    folders: Sequence[str],
    history: History,
    class_names: Sequence[str],
    table: str | None,
    val_fraction: float,
    image_size: int,
) -> list[Cohort]:
    """Open the folders of --also_trained_on.

    Raises:
        UserError: the model's history does not list a folder's data; or the folder's splits are not those
            that the model was trained with.
    """
    cohorts = []
    for folder in folders:
        path, data = open_data_dir(folder), None
        # The model may have been trained on classes that this evaluation leaves out.
        for names in dict.fromkeys((classes_in(path), tuple(class_names))):
            listing = open_folder(path, names, table)
            splits = read_slices(listing, val_fraction)
            data = describe_data(listing, splits)
            if data.hash in history.hashes:
                break
        if history.hashes and data.hash not in history.hashes:
            listed = ", ".join(digest[:12] for digest in history.hashes)
            raise UserError(
                f"{FLAG} {folder}: its data hash is {data.hash[:12]}, but {history.model} was trained on "
                f"{listed}; give the folders, --table and --classes that it was trained with"
            )
        own = [record for record in history.records if record["hash"] == data.hash]
        check_leakage(history.model, own, data)
        cohorts.append(Cohort(folder, data, relabel(real_set(splits["train"], image_size), class_names)))
    return cohorts


def check_held_out(history: History, data: DataRecord, cohorts: Sequence[Cohort]) -> None:
    """Raise UserError if the model was trained on a subject that is held out in `data`.

    Compares with the records, and with the training subjects of the cohorts at hand: the records of a
    published model have no subjects.
    """
    check_leakage(history.model, history.records, data)
    for cohort in cohorts:
        check_leakage(f"{history.model} ({FLAG} {cohort.folder})", training_records(cohort.data), data)


def find_model(name: str, samples: str | Path) -> Path | None:
    """The folder of the pipeline that metadata.csv names: relative to here, the samples, or their parents.

    None if there is none: the samples were moved, or generated by a model from the Hub.
    """
    places = ["", samples, *Path(samples).resolve().parents]
    folders = [Path(place, name) for place in places] if name else []
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)


def _lists(records: Sequence[Mapping], digest: str) -> bool:
    return any(record["hash"] == digest for record in records)
