"""Assemble what is pushed in a folder of its own: nothing but what is listed here.

    model      the pipeline as `save_pretrained` writes it (safetensors, and the code for trust_remote_code),
               samples in previews/, metrics.csv and its curves, metrics.json of the report, README.md
    samples    the slices listed in metadata.csv, metadata.csv with the columns of sample.py, without the path
               of the model, metrics.json of the report, README.md

The salted hashes of subject IDs in a model's config are removed: whoever hashes all possible IDs would find
the training subjects.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from diffusers import ConfigMixin

from adni_ldm.data.cells import escape_table, unescape_table
from adni_ldm.data.folder import FolderListing
from adni_ldm.data.sample_folder import SAMPLE_COLUMNS
from adni_ldm.errors import UserError
from adni_ldm.figures import save_curves, to_pil
from adni_ldm.files import read_json, write_json
from adni_ldm.generation import generate_images, image_seed
from adni_ldm.hub.card import write_dataset_card, write_model_card
from adni_ldm.hub.report import Report
from adni_ldm.pipeline import ClassConditionalLDMPipeline

PREVIEWS = 4  # of each class
_PUSHED_METRICS = ("verdicts", "fidelity", "spectrum", "tstr", "conditioning", "conditions")
_PUSHED_METRICS += ("anatomy", "privacy")
_PUSHED_METRICS += ("model_hash", "data_hash")
_PUSHED_COLUMNS = [name for name in SAMPLE_COLUMNS if name not in ("model", "extrapolated")]
_PUSHED_PRIVATE = ("_class_name", "_diffusers_version", "_trained_on")  # of diffusers' configs, and ours
_PUSHED_PRIVATE += ("_patch_size", "_decoder_noise", "_base_model")


def bundle_model(
    folder: Path,
    run: Path,
    repo_id: str,
    pipeline: ClassConditionalLDMPipeline,
    listings: Sequence[FolderListing],
    report: Report,
    license: str | None,
    figures: Path | None = None,
) -> None:
    """Write what is pushed of the model in `run` into the new `folder`.

    Args:
        listings: the training data; the last is what `run` was trained on.
        figures: folder of the report, to push its page and its figures of real scans as well.
    """
    previews = _save_previews(pipeline, folder)
    pipeline.to("cpu").save_pretrained(folder, safe_serialization=True)
    _strip_config(folder / "model_index.json", pipeline)
    for name, part in pipeline.components.items():
        if part is None:  # no conditions
            continue
        _strip_config(folder / name / part.config_name, part)
    _write_losses(run / "metrics.csv", folder)
    _write_metrics(folder, report)
    if figures and report.metrics:
        for path in (figures / "report.html", *(figures / "figures").rglob("*.png")):
            _copy(path, folder / path.relative_to(figures))
    write_model_card(folder / "README.md", repo_id, pipeline, run, listings, report, license, previews)


def bundle_samples(
    folder: Path,
    samples: Path,
    repo_id: str,
    listings: Sequence[FolderListing],
    report: Report,
    license: str | None,
) -> None:
    """Write what is pushed of the slices that sample.py wrote to `samples` into the new `folder`."""
    table = read_samples(samples)
    for name in table.file_name:
        _copy(samples / name, folder / name)
    table = table[[name for name in _PUSHED_COLUMNS if name in table]]
    escape_table(table).to_csv(folder / "metadata.csv", index=False)
    _write_metrics(folder, report)
    settings = table.drop(columns=["file_name", "label", "seed"]).iloc[0].to_dict()
    count = table.label.value_counts(sort=False).to_dict()
    write_dataset_card(folder / "README.md", repo_id, settings, count, listings, report, license)


def read_samples(samples: Path) -> pd.DataFrame:
    """The metadata.csv that sample.py wrote, all columns as text.

    Raises:
        UserError: there is none, its slices are of several models or of one without a record of its training
            data, or it names a file that is no PNG in the folder.
    """
    path = samples / "metadata.csv"
    if not path.is_file():
        raise UserError(f"{samples}: contains no metadata.csv; give a folder that sample.py wrote")
    table = unescape_table(pd.read_csv(path, dtype=str, keep_default_na=False))
    if table.empty or not {"file_name", "label", "seed", "model_hash", "data_hash"} <= set(table):
        raise UserError(f"{path}: not written by sample.py; give a folder that it wrote")
    if len(models := sorted(set(table.model_hash))) > 1:
        raise UserError(
            f"{path}: slices of {len(models)} models, of which a report evaluates one; push those of each "
            f"model_hash on their own ({', '.join(models)})"
        )
    if unknown := list(table.file_name[table.data_hash == ""]):
        raise UserError(
            f"{path}: no data_hash of {unknown[0]}, so it cannot be compared with the training data "
            f"({len(unknown)} such slices); sample again from a model that train_ldm.py wrote"
        )
    for name in table.file_name:
        source = samples / name
        inside = ".." not in Path(name).parts and source.resolve().is_relative_to(samples.resolve())
        if not inside or source.suffix != ".png" or not source.is_file():
            raise UserError(f"{path}: there is no PNG {name} in the folder; sample again")
    return table


def _save_previews(pipeline: ClassConditionalLDMPipeline, folder: Path) -> list[str]:
    """Samples of each class, each in its own file so that the leak scan compares each with the data."""
    (folder / "previews").mkdir(parents=True)
    seeds = [image_seed(0, index) for index in range(PREVIEWS)]
    names = []
    for label, name in enumerate(pipeline.class_embedding.config.class_names):
        batches = generate_images(pipeline, [label] * PREVIEWS, seeds, PREVIEWS)
        for index, image in enumerate(image for batch in batches for image in batch):
            names.append(f"previews/{name}-{index}.png")
            to_pil(image).save(folder / names[-1])
    return names


def _strip_config(path: Path, part: ConfigMixin) -> None:
    """Remove from a config the hashes of subject IDs, and entries that `part` does not have: diffusers keeps
    them unread."""
    known = {*inspect.signature(type(part).__init__).parameters, *_PUSHED_PRIVATE}
    config = {name: value for name, value in read_json(path).items() if name in known}
    if records := config.get("_trained_on"):
        kept = [{"hash": record["hash"], "hash_of": record["hash_of"]} for record in records]
        config["_trained_on"] = [record | {"ids": ""} for record in kept]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_losses(source: Path, folder: Path) -> None:
    """Write the numbers of a metrics.csv, and their curves: a loss.png of the run may show something else."""
    table = pd.read_csv(source).select_dtypes("number") if source.is_file() else pd.DataFrame()
    if len(table) and "step" in table:
        table.to_csv(folder / "metrics.csv", index=False)
        save_curves(folder / "metrics.csv", folder / "loss.png")


def _write_metrics(folder: Path, report: Report) -> None:
    if metrics := {name: report.metrics[name] for name in _PUSHED_METRICS if name in report.metrics}:
        write_json(folder / "metrics.json", metrics)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
