"""Push a model, or samples of it, to the Hub: check the report, assemble, scan for leaks, upload."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from adni_ldm.data.archives import open_data_dir
from adni_ldm.data.folder import FolderListing, classes_in
from adni_ldm.data.hub_datasets import OPTIONS, as_folder, is_hub_name
from adni_ldm.data.manifest import data_hash, manifest_problems, read_manifest
from adni_ldm.data.provenance import model_records, records_by_part
from adni_ldm.data.slices import open_folder
from adni_ldm.errors import UserError
from adni_ldm.files import check_empty_dir
from adni_ldm.generation import hash_pipeline
from adni_ldm.hub.bundle import bundle_model, bundle_samples, read_samples
from adni_ldm.hub.card import read_settings
from adni_ldm.hub.leak_scan import check_leaks, index_training_data
from adni_ldm.hub.report import check_privacy, read_report
from adni_ldm.hub.upload import check_login, check_not_public, upload_folder
from adni_ldm.loading import load_pipeline


def push_model(
    folder: str | Path,
    repo_id: str | None,
    data_dir: Sequence[str] = (),
    table: str | None = None,
    report: str | None = None,
    accept_privacy_risk: bool = False,
    license: str | None = None,
    allow_real_images: bool = False,
    **destination,
) -> None:
    """Push the pipeline in `folder`; the arguments are the settings of `config.PushConfig`.

    Args:
        destination: `public`, `overwrite` and `dry_run`.

    Raises:
        UserError: a check failed; nothing was uploaded.
    """
    run = Path(folder)
    pipeline = load_pipeline(str(run))
    report_dir = Path(report or run / "report")
    hashes = training_hashes(str(run), pipeline.components)
    evaluated = read_report(report_dir, hash_pipeline(pipeline), hashes)
    check_privacy(evaluated, accept_privacy_risk)
    class_names = pipeline.class_embedding.config.class_names
    listings = open_training_data(data_dir, table, read_settings(run), class_names, hashes)
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())

    def bundle(target: Path) -> None:
        figures = report_dir if allow_real_images else None
        bundle_model(target, run, repo_id, pipeline, listings, evaluated, license, figures)

    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    url = _scan_and_upload(bundle, listings, size, repo_id, "model", allow_real_images, **destination)
    if url:
        print(f"pushed to {url}: python sample.py --model {repo_id} --class all")


def push_dataset(
    folder: str | Path,
    repo_id: str | None,
    data_dir: Sequence[str] = (),
    table: str | None = None,
    report: str | None = None,
    accept_privacy_risk: bool = False,
    license: str | None = None,
    **destination,
) -> None:
    """Push the samples in `folder` as a data set; the arguments are those of `config.PushSamplesConfig`.

    Args:
        destination: `public`, `overwrite` and `dry_run`.

    Raises:
        UserError: a check failed; nothing was uploaded.
    """
    samples = Path(folder)
    images = read_samples(samples)
    first = images.iloc[0]
    hashes = sorted({value for row in images.data_hash for value in row.split("+")})
    model = Path(first.model)
    if unnamed := {record["hash"] for record in model_records(model)} - set(hashes):
        raise UserError(
            f"{samples / 'metadata.csv'}: does not name the data with the hash {min(unnamed)[:16]}, which "
            f"{model} was trained on; sample again"
        )
    evaluated = read_report(Path(report or model / "report"), first.model_hash, hashes)
    check_privacy(evaluated, accept_privacy_risk)
    settings = read_settings(model)
    classes = settings.get("classes") or ",".join(sorted(set(images.label)))
    listings = open_training_data(data_dir, table, settings, classes.split(","), hashes)

    def bundle(target: Path) -> None:
        bundle_samples(target, samples, repo_id, listings, evaluated, license)

    with Image.open(samples / first.file_name, formats=["PNG"]) as image:
        size = image.width
    url = _scan_and_upload(bundle, listings, size, repo_id, "dataset", **destination)
    if url:
        print(f"pushed {len(images)} slices to {url}: load_dataset({repo_id!r}, split='train')")


def check_push(repo_id: str, data_dir: str, table: str | None, parts: Mapping[str, Any]) -> None:
    """Check before training what would refuse the push after it: the login, and data that are not at hand.

    Args:
        data_dir, table: what is trained on.
        parts: of the model to train, as in `pipeline.components`, their training data recorded.

    Raises:
        UserError: the push would be refused.
    """
    check_login(repo_id)
    check_not_public(repo_id)
    class_names = parts["class_embedding"].config.class_names
    try:
        open_training_data([data_dir], table, {}, class_names, training_hashes(repo_id, parts))
    except UserError as error:
        raise UserError(
            f"{error}. --push_to_hub pushes with the --data_dir of this training alone: train without it, "
            "then use python -m adni_ldm.hub push"
        ) from error


def training_hashes(name: str, parts: Mapping[str, Any]) -> list[str]:
    """Hashes of all data that a model's `parts` (`pipeline.components`) were trained on, the U-Net's last at
    the end.

    Raises:
        UserError: the U-Net has no record of its training data.
    """
    own = records_by_part(parts)["unet"]
    if not own:
        raise UserError(
            f"{name}: its U-Net has no record of its training data, so nothing can be compared with them; "
            "push a model that train_ldm.py wrote"
        )
    hashes = dict.fromkeys(record["hash"] for record in model_records(parts))
    return [value for value in hashes if value != own[-1]["hash"]] + [own[-1]["hash"]]


def open_training_data(
    data_dirs: Sequence[str],
    table: str | None,
    settings: Mapping,
    class_names: Sequence[str],
    hashes: Sequence[str],
) -> list[FolderListing]:
    """The folders of data that the model was trained on, complete, each with all its classes; at the end,
    that of the last of `hashes` with the classes of the model.

    Args:
        data_dirs, table: as given; by default those of `settings`, the run's training_config.json.

    Raises:
        UserError: a folder is missing, contains other data, or has changed since it was prepared.
    """
    recorded = settings.get("data_dir")
    at_hand = recorded and (Path(recorded).exists() or is_hub_name(recorded))
    data_dirs = data_dirs or ([recorded] if at_hand else [])
    options = {name: settings[name] for name in OPTIONS if name in settings}
    table, listings, found = table or settings.get("table"), [], {}
    for folder in data_dirs:
        root = open_data_dir(as_folder(folder, class_names, **options))
        # All classes, also those that the model lacks, or that the folder has lost according to its manifest.
        splits = (read_manifest(root) or {"splits": {}})["splits"].values()
        every = sorted({*classes_in(root), *(name for split in splits for name in split)})
        whole, own = open_folder(root, every, table), open_folder(root, class_names, table)
        found |= {data_hash(whole)[0]: own, data_hash(own)[0]: own}
        listings.append(whole)
    if missing := [value for value in hashes if value not in found]:
        given = ", ".join(map(str, data_dirs)) or "none"
        raise UserError(
            f"--data_dir {given}: the model was trained on data with the hash {missing[0][:16]}, which is "
            "not among them; give every folder that it was trained on (and --table): the leak scan needs them"
        )
    for listing in listings:
        listing.problems += manifest_problems(listing, content=True)
        listing.raise_problems()
    return [*listings, found[hashes[-1]]]


def _scan_and_upload(
    bundle: Callable[[Path], None],
    listings: Sequence[FolderListing],
    size: int,
    repo_id: str | None,
    repo_type: str,
    allow_real_images: bool = False,
    public: bool = False,
    overwrite: bool = False,
    dry_run: str | None = None,
) -> str | None:
    """Assemble the folder, scan it and upload it; returns the URL, or None for a dry run."""
    if not repo_id:
        raise UserError("--repo_id ME/NAME is missing: which repository to push to")
    if dry_run is None:
        check_login(repo_id)  # before minutes of work
    else:
        check_empty_dir(dry_run, "--dry_run")
    with tempfile.TemporaryDirectory(prefix="adni_ldm_hub_") as temporary:
        target = Path(dry_run or temporary)
        target.mkdir(parents=True, exist_ok=True)
        bundle(target)
        training = index_training_data(listings, size)
        check_leaks(target, training, repo_id, allow_real_images=allow_real_images)
        if dry_run is not None:
            print(f"what would be pushed to {repo_id} is in {dry_run}; the leak scan found nothing")
            return None
        return upload_folder(target, repo_id, repo_type, public, overwrite)
