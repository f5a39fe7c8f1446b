"""What is pushed, put together in a folder of its own: only what is listed here ever leaves.

    model      the pipeline as `save_pretrained` writes it (safetensors, and the code for trust_remote_code),
               previews/ drawn by it, metrics.csv, loss.png, metrics.json of the report, README.md
    samples    the slices that metadata.csv lists, metadata.csv without the model's place, README.md

The salted hashes of subjects' names that a model's config carries are taken out: who tries every name that
there could be finds those that are in.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets import DatasetDict
from torchvision.transforms.functional import to_pil_image

from adni_ldm.data.folder import FolderListing
from adni_ldm.data.manifest import data_hash, read_manifest
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.errors import UserError
from adni_ldm.generation import generate_images, image_seed
from adni_ldm.hub.card import Report, write_dataset_card, write_model_card
from adni_ldm.pipeline import ClassConditionalLDMPipeline

PREVIEWS = 4  # of each class
STEPS = 30
_OF_REPORT = (
    "verdicts",
    "fidelity",
    "usefulness",
    "faithfulness",
    "anatomy",
    "privacy",
    "model_hash",
    "data_hash",
)


def open_data(
    data_dirs: Sequence[str], class_names: Sequence[str], table: str | None, wanted: Sequence[str]
) -> list[FolderListing]:
    """The folders of data that a model was trained on, one for each of the hashes `wanted`.

    Raises UserError for a folder that is none, or is other data, and where one is missing.
    """
    scans = [open_folder(folder, class_names, table) for folder in data_dirs]
    found = {data_hash(scan)[0] for scan in scans}
    if lacking := [one for one in wanted if one not in found]:
        given = ", ".join(map(str, data_dirs)) or "none"
        raise UserError(
            f"--data_dir {given}: the model was trained on data with the hash {lacking[0][:16]}, which is "
            "not among them; give every folder it was trained on (and --table), for the push is looked "
            "through for them"
        )
    return scans


def count_split(scan: FolderListing, val_fraction: float) -> list[dict]:
    """Subjects and slices of each split and class, as training splits the data."""
    rows = []
    splits: DatasetDict = read_slices(scan, val_fraction)
    for split, dataset in splits.items():
        whose = list(zip(dataset["label"][:], dataset["subject"][:], strict=True))
        for label, name in enumerate(scan.class_names):
            subjects = [subject for number, subject in whose if number == label]
            row = {"split": split, "class": name, "subjects": len(set(subjects)), "slices": len(subjects)}
            rows.append(row)
    return rows


def is_synthetic(scans: Sequence[FolderListing]) -> bool:
    """Whether all the data are the phantom cohort, by their manifests."""
    manifests = [read_manifest(scan.root) or {} for scan in scans]
    return all(manifest.get("settings", {}).get("source") == "phantom" for manifest in manifests)


def bundle_model(
    folder: Path,
    run: Path,
    repo_id: str,
    pipeline: ClassConditionalLDMPipeline,
    scans: Sequence[FolderListing],
    val_fraction: float,
    report: Report,
    report_dir: Path,
    license: str | None,
    allow_real_images: bool = False,
) -> None:
    """Write into the new `folder` what is pushed of the model that train_ldm.py wrote to `run`."""
    folder.mkdir(parents=True, exist_ok=True)
    previews = _draw_previews(pipeline, folder)
    pipeline.to("cpu").save_pretrained(folder, safe_serialization=True)
    for config in folder.rglob("*.json"):
        _strip_config(config)
    for name in ("metrics.csv", "loss.png"):
        if (run / name).is_file():
            shutil.copyfile(run / name, folder / name)
    _write_metrics(folder / "metrics.json", report)
    if allow_real_images and report.metrics:
        for path in (report_dir / "report.html", *(report_dir / "figures").rglob("*.png")):
            target = folder / path.relative_to(report_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    split = count_split(scans[-1], val_fraction)
    write_model_card(
        folder / "README.md", repo_id, pipeline, run, split, is_synthetic(scans), report, license, previews
    )


def bundle_samples(
    folder: Path,
    samples: Path,
    repo_id: str,
    scans: Sequence[FolderListing],
    report: Report,
    license: str | None,
) -> None:
    """Write into the new `folder` what is pushed of the slices that sample.py wrote to `samples`.

    Raises UserError where metadata.csv names a file that is not there, or not in the folder.
    """
    rows = read_samples(samples)
    settings = {
        name: value for name, value in rows[0].items() if name not in ("file_name", "label", "seed", "model")
    }
    for row in rows:
        source = (samples / row["file_name"]).resolve()
        if not source.is_relative_to(samples.resolve()) or not source.is_file():
            raise UserError(
                f"{samples / 'metadata.csv'}: {row['file_name']} is no file in the folder; draw anew"
            )
        target = folder / row["file_name"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "model"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    _write_metrics(folder / "metrics.json", report)
    count = Counter(row["label"] for row in rows)
    write_dataset_card(folder / "README.md", repo_id, settings, count, is_synthetic(scans), report, license)


def read_samples(samples: Path) -> list[dict[str, str]]:
    """Rows of metadata.csv of drawn slices. Raises UserError where there is none, or it is another."""
    path = samples / "metadata.csv"
    if not path.is_file():
        raise UserError(f"{samples}: no metadata.csv there; give a folder that sample.py wrote")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"file_name", "label", "seed", "model_hash", "data_hash"} <= set(rows[0]):
        raise UserError(f"{path}: not of slices that sample.py drew; give a folder that it wrote")
    return rows


def _draw_previews(pipeline: ClassConditionalLDMPipeline, folder: Path) -> list[str]:
    """Pictures of each class, each in a file of its own so that each can be compared with the data."""
    (folder / "previews").mkdir()
    pipeline.set_progress_bar_config(disable=True)
    seeds = [image_seed(0, index) for index in range(PREVIEWS)]
    names = []
    for label, name in enumerate(pipeline.class_embedding.config.class_names):
        batches = generate_images(pipeline, [label] * PREVIEWS, seeds, PREVIEWS, num_inference_steps=STEPS)
        for index, image in enumerate(image for batch in batches for image in batch):
            names.append(f"previews/{name}-{index}.png")
            to_pil_image(image).save(folder / names[-1])
    return names


def _strip_config(path: Path) -> None:
    """Take out of a component's config where it lay and whom it was trained on."""
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    for record in config.get("_trained_on") or ():
        record["ids"] = ""
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write_metrics(path: Path, report: Report) -> None:
    if metrics := {name: report.metrics[name] for name in _OF_REPORT if name in report.metrics}:
        path.write_text(json.dumps(metrics, indent=1) + "\n")
