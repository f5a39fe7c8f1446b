"""The whole way of a model, or of drawn slices, to the Hub: judged, put together, looked through, pushed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import HfApi
from PIL import Image

from adni_ldm.data.folder import FolderListing
from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.hub.bundle import bundle_model, bundle_samples, open_data, read_samples
from adni_ldm.hub.card import read_report, read_settings, refuse_privacy_risk
from adni_ldm.hub.leak_scan import hash_data, look_through
from adni_ldm.hub.push import check_login, push_folder
from adni_ldm.loading import load_pipeline

MOST_FINDINGS = 20  # named in the refusal


def share_model(
    folder: str | Path,
    repo_id: str | None,
    data_dir: Sequence[str] = (),
    table: str | None = None,
    report: str | None = None,
    public: bool = False,
    allow_real_images: bool = False,
    accept_privacy_risk: bool = False,
    overwrite: bool = False,
    license: str | None = None,
    dry_run: str | None = None,
) -> None:
    """Push the pipeline in `folder` to `repo_id`; the settings are those of `config.PushConfig`.

    Raises UserError for whatever stands against it; nothing has left the machine then.
    """
    run = Path(folder)
    pipeline = load_pipeline(str(run))
    settings = read_settings(run)
    report_dir = Path(report or run / "report")
    judged = read_report(report_dir, hash_pipeline(pipeline))
    refuse_privacy_risk(judged, accept_privacy_risk)
    wanted = [record["hash"] for record in pipeline.unet.config.get("_trained_on") or ()]
    scans = open_data(
        data_dir or _recorded_data(settings),
        pipeline.class_embedding.config.class_names,
        table or settings.get("table"),
        wanted,
    )
    if torch.accelerator.is_available():
        pipeline.to(torch.accelerator.current_accelerator())

    def fill(target: Path) -> None:
        fraction = settings.get("val_fraction", 0.1)
        bundle_model(
            target, run, repo_id, pipeline, scans, fraction, judged, report_dir, license, allow_real_images
        )

    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    url = _send(fill, scans, size, repo_id, "model", public, overwrite, dry_run, allow_real_images)
    if url:
        print(f"pushed to {url}: python sample.py --model {repo_id} --class all")


def share_samples(
    folder: str | Path,
    repo_id: str | None,
    data_dir: Sequence[str] = (),
    table: str | None = None,
    report: str | None = None,
    public: bool = False,
    accept_privacy_risk: bool = False,
    overwrite: bool = False,
    license: str | None = None,
    dry_run: str | None = None,
) -> None:
    """Push the drawn slices in `folder` to `repo_id`; the settings are those of `config.PushSamplesConfig`.

    Raises UserError for whatever stands against it; nothing has left the machine then.
    """
    samples = Path(folder)
    rows = read_samples(samples)
    model = Path(rows[0]["model"])
    judged = read_report(Path(report or model / "report"), rows[0]["model_hash"])
    refuse_privacy_risk(judged, accept_privacy_risk)
    settings = read_settings(model)
    classes = settings.get("classes") or ",".join(sorted({row["label"] for row in rows}))
    scans = open_data(
        data_dir or _recorded_data(settings),
        classes.split(","),
        table or settings.get("table"),
        [hash for hash in rows[0]["data_hash"].split("+") if hash],
    )

    def fill(target: Path) -> None:
        bundle_samples(target, samples, repo_id, scans, judged, license)

    with Image.open(samples / rows[0]["file_name"]) as first:
        size = first.width
    url = _send(fill, scans, size, repo_id, "dataset", public, overwrite, dry_run)
    if url:
        print(f"pushed {len(rows)} slices to {url}: load_dataset({repo_id!r}, split='train')")


def _recorded_data(settings: dict) -> list[str]:
    """The data folder of a run's training_config.json, where it still is."""
    folder = settings.get("data_dir")
    return [folder] if folder and Path(folder).exists() else []


def _send(
    fill: Callable[[Path], None],
    scans: Sequence[FolderListing],
    size: int,
    repo_id: str | None,
    repo_type: str,
    public: bool,
    overwrite: bool,
    dry_run: str | None,
    allow_real_images: bool = False,
) -> str | None:
    """Put together, look through, push; the repository's address, or None of a dry run."""
    if not repo_id:
        raise UserError("--repo_id ME/NAME is missing: which repository to push to")
    api = HfApi()
    if dry_run is None:
        check_login(api, repo_id)  # before minutes of work
    elif Path(dry_run).exists() and any(Path(dry_run).iterdir()):
        raise UserError(f"--dry_run {dry_run} is not empty: remove it or choose another")
    with tempfile.TemporaryDirectory(prefix="adni_ldm_hub_") as temporary:
        target = Path(dry_run or temporary)
        target.mkdir(parents=True, exist_ok=True)
        fill(target)
        findings = look_through(target, hash_data(scans, size), repo_id, allow_real_images)
        if findings:
            listed = "; ".join(findings[:MOST_FINDINGS])
            more = f"; and {len(findings) - MOST_FINDINGS} more" if len(findings) > MOST_FINDINGS else ""
            raise UserError(f"nothing was pushed, for this must not leave: {listed}{more}")
        if dry_run is not None:
            print(f"what would be pushed to {repo_id} is in {dry_run}; nothing was found that must not leave")
            return None
        return push_folder(api, target, repo_id, repo_type, public, overwrite)
