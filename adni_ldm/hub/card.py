"""Model card and dataset card: README.md of a repository, with the Hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData

from adni_ldm.data.folder import FolderListing
from adni_ldm.data.manifest import read_manifest
from adni_ldm.data.provenance import model_records
from adni_ldm.data.slices import read_slices
from adni_ldm.files import read_json
from adni_ldm.generation import describe_sampling, hash_pipeline
from adni_ldm.hub.report import Report, list_figures
from adni_ldm.pipeline import ClassConditionalLDMPipeline

TAGS = ("diffusers", "latent-diffusion", "class-conditional", "medical-imaging", "mri", "brain", "alzheimer")
# Settings that name paths, or concern checkpoints and logs, and not the method. Listed here and not at the
# fields, since only recipes import config.
NOT_METHOD = {"data_dir", "output_dir", "table", "vae", "init_from", "resume_from_checkpoint", "report_to"}
NOT_METHOD |= {"hub_model_id", "push_to_hub", "accept_privacy_risk", "num_workers", "log_steps"}
NOT_METHOD |= {"checkpointing_steps", "checkpoints_total_limit", "latent_cache", "allow_remote_tracker"}
NOT_METHOD |= {"revision", "variant"}
NOT_METHOD |= {"num_inference_steps", "guidance_scale", "eta"}  # the pipeline has them, with their defaults


def write_model_card(
    path: Path,
    repo_id: str,
    pipeline: ClassConditionalLDMPipeline,
    run: Path,
    listings: Sequence[FolderListing],
    report: Report,
    license: str | None,
    previews: Sequence[str],
) -> None:
    """Write README.md of a model.

    Args:
        run: folder that train_ldm.py wrote.
        listings: the training data; the last is what `run` was trained on.
        previews: paths of sample images, relative to the card.
    """
    data = {record["hash"]: record for record in model_records(pipeline.components)}.values()
    settings = read_settings(run)
    synthetic = is_synthetic(listings)
    bases = base_models(pipeline)
    card_data = ModelCardData(
        **_license(license, synthetic, bases),
        base_model=[base["name"] for base in bases if "/" in base["name"]] or None,
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[*TAGS, *(["synthetic-data"] if synthetic else [])],
        model_name=repo_id.split("/")[1],
        eval_results=[
            _eval_result(name, figure, report.metrics["data_hash"])
            for name, figure in list_figures(report.metrics)
        ]
        or None,
    )
    (privacy,) = (verdict for verdict in report.verdicts if verdict.name == "privacy")
    _write_card(
        path,
        "model_card.md",
        card_data,
        report,
        repo_id=repo_id,
        classes=list(pipeline.class_embedding.config.class_names),
        sizes=_sizes(pipeline),
        bases=bases,
        model_hash=hash_pipeline(pipeline),
        data=data,
        split=count_slices(listings[-1], settings.get("val_fraction", 0.1)),
        subjects_known=listings[-1].subjects_known,
        settings={name: value for name, value in settings.items() if name not in NOT_METHOD},
        losses=last_losses(run),
        synthetic=synthetic,
        previews=previews,
        privacy=privacy,
    )


def write_dataset_card(
    path: Path,
    repo_id: str,
    settings: Mapping,
    count: Mapping[str, int],
    listings: Sequence[FolderListing],
    report: Report,
    license: str | None,
) -> None:
    """Write README.md of samples: their sampling `settings`, and the `count` of slices of each class."""
    synthetic = is_synthetic(listings)
    known = all(listing.subjects_known for listing in listings)
    card_data = DatasetCardData(
        **_license(license, synthetic),
        pretty_name=repo_id.split("/")[1],
        task_categories=["image-classification"],
        size_categories=_size_category(sum(count.values())),
        tags=[*TAGS[1:], "synthetic"],
    )
    facts = {"repo_id": repo_id, "settings": settings, "count": count, "synthetic": synthetic}
    facts["subjects_known"] = known
    _write_card(path, "dataset_card.md", card_data, report, **facts)


def _write_card(path: Path, template: str, card_data, report: Report, **facts) -> None:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent))
    figures = [(name, _value(figure), figure) for name, figure in list_figures(report.metrics)]
    artefact = {"model_card.md": "model", "dataset_card.md": "data set"}[template]
    facts |= {"card_data": card_data.to_yaml(), "report": report, "figures": figures, "artefact": artefact}
    path.write_text(environment.get_template(template).render(facts) + "\n", encoding="utf-8")


def is_synthetic(listings: Sequence[FolderListing]) -> bool:
    """Whether all the data are the phantom cohort, according to their manifests."""
    manifests = [read_manifest(listing.root) or {} for listing in listings]
    return all(manifest.get("settings", {}).get("source") == "phantom" for manifest in manifests)


def count_slices(listing: FolderListing, val_fraction: float) -> list[dict]:
    """Numbers of subjects and slices of each split and class, with the splits of training."""
    rows = []
    for split, dataset in read_slices(listing, val_fraction).items():
        pairs = list(zip(dataset["label"][:], dataset["subject"][:], strict=True))
        for label, name in enumerate(listing.class_names):
            subjects = [subject for number, subject in pairs if number == label]
            rows.append(
                {"split": split, "class": name, "subjects": len(set(subjects)), "slices": len(subjects)}
            )
    return rows


def read_settings(run: Path) -> dict:
    """training_config.json of a run; {} without one."""
    path = run / "training_config.json"
    return read_json(path) if path.is_file() else {}


def last_losses(run: Path) -> dict[str, str]:
    """The last value of each column of metrics.csv, and the lowest `val_loss`; {} without a metrics.csv."""
    path = run / "metrics.csv"
    table = pd.read_csv(path).select_dtypes("number") if path.is_file() else pd.DataFrame()
    if table.empty:
        return {}
    last = table.ffill().iloc[-1].dropna().to_dict()
    if "val_loss" in last:
        last["lowest val_loss"] = table.val_loss.min()
    return {name: f"{value:.4g}" for name, value in last.items()}


def _value(figure: Mapping) -> str:
    """A figure with its interval: 3.21 (2.9 to 3.6)."""
    low, high = figure.get("low"), figure.get("high")
    interval = f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else ""
    return f"{figure['value']:.4g}{interval}"


def _eval_result(name: str, figure: Mapping, data_hash: str) -> EvalResult:
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type="image-folder",
        dataset_name=f"slices, hash {data_hash[:16]}",
        metric_type=name,
        metric_value=figure["value"],
    )


def base_models(pipeline: ClassConditionalLDMPipeline) -> list[dict[str, str]]:
    """Name and license of each model from elsewhere that U-Net or VAE was fine-tuned from."""
    records = [part.config.get("_base_model") for part in (pipeline.unet, pipeline.vae)]
    return [dict(base) for number, base in enumerate(records) if base and base not in records[:number]]


def _license(license: str | None, synthetic: bool, bases: Sequence[Mapping] = ()) -> dict:
    of_bases = {base["license"] for base in bases} or {"apache-2.0"}
    if not license and synthetic:
        if len(of_bases) > 1 or of_bases & {"other", "not stated"}:  # it is for the author to find out
            return {"license": "other", "license_name": "of-the-base-models"}
        (license,) = of_bases
    if license and license != "other":
        return {"license": license}
    link = "https://adni.loni.usc.edu"
    return {"license": "other", "license_name": "adni-data-use-agreement", "license_link": link}


def _sizes(pipeline: ClassConditionalLDMPipeline) -> dict[str, str]:
    unet, vae = pipeline.unet.config, pipeline.vae
    side, latent = unet.sample_size * pipeline.vae_scale_factor, unet.sample_size

    def count(module) -> str:
        return f"{sum(tensor.numel() for tensor in module.parameters()):,} parameters"

    conditions = {}
    if embedding := pipeline.condition_embedding:
        conditions = {
            "conditions beside the class": embedding.describe(),
            "condition embedding": f"{count(embedding)}, a token for each condition",
        }
    if calibration := pipeline.linear_calibration:
        conditions["linear calibration"] = f"{calibration.config.rank} principal components of the latents"
    return {
        "slice": f"1 × {side} × {side}, greyscale",
        "latent": f"{unet.in_channels} × {latent} × {latent}",
        "autoencoder (AutoencoderKL)": f"{count(vae)}, channels {list(vae.config.block_out_channels)}",
        "U-Net (UNet2DConditionModel)": f"{count(pipeline.unet)}, channels {list(unet.block_out_channels)}",
        "class embedding": f"{count(pipeline.class_embedding)}, tokens of width {unet.cross_attention_dim}",
        **conditions,
        "prediction type": str(pipeline.scheduler.config.prediction_type),
        "sampling, by default": describe_sampling(pipeline),
    }


def _size_category(count: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < limit:
            return name
    return "100K<n<1M"
