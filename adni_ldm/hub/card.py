"""Cards: what is known of a model, or of slices that it drew, in words and in the Hub's metadata."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.pipeline import ClassConditionalLDMPipeline

QUESTIONS = ("fidelity", "usefulness", "faithfulness", "privacy")
TAGS = ("diffusers", "latent-diffusion", "class-conditional", "medical-imaging", "mri", "brain", "alzheimer")
_NOT_TOLD = {"good": None, "text": "not measured"}
# Settings that say where things lie, or how the run was watched, and nothing of the method.
_PLACES = {"data_dir", "output_dir", "table", "vae", "init_from", "resume_from_checkpoint", "report_to"}
_PLACES |= {"hub_model_id", "push_to_hub", "accept_privacy_risk", "num_workers", "log_steps"}
_PLACES |= {"checkpointing_steps", "checkpoints_total_limit"}


@dataclass(frozen=True)
class Report:
    """What evaluate.py found, or that it is not known and why."""

    metrics: Mapping  # report/metrics.json; {} where there is none that counts
    missing: str = ""  # why there is none

    def verdict(self, question: str) -> Mapping:
        """{"good": true, false or None, "text": …}."""
        return self.metrics.get("verdicts", {}).get(question) or _NOT_TOLD


def read_report(folder: Path, model_hash: str) -> Report:
    """The report in a folder, if it judged the model with these weights.

    Raises UserError for a metrics.json that cannot be read.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        return Report({}, "there is no report: run evaluate.py, and give its folder with --report")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        judged = metrics["model_hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a report of evaluate.py ({error!r}); run it again") from error
    if judged != model_hash:
        return Report(
            {}, f"the report judged another model ({judged}, this is {model_hash}): run evaluate.py"
        )
    return Report(metrics)


def refuse_privacy_risk(report: Report, accept: bool) -> None:
    """Raises UserError unless the report says that privacy is good, or the risk is accepted."""
    verdict = report.verdict("privacy")
    if verdict["good"] is True or accept:
        return
    said = f"the verdict on privacy is bad ({verdict['text']})"
    if verdict["good"] is None:
        said = f"there is no verdict on privacy ({report.missing or verdict['text']})"
    raise UserError(f"{said}: a memorized scan may leave with it; --accept_privacy_risk pushes all the same")


def figures_of(metrics: Mapping, place: str = "") -> Iterator[tuple[str, Mapping]]:
    """Pairs of a name, such as fidelity/fid, and its {"value", "low", "high", "floor", "note"}."""
    for name, entry in metrics.items():
        if isinstance(entry, Mapping):
            if isinstance(entry.get("value"), (int, float)) and math.isfinite(entry["value"]):
                yield place + name, entry
            elif "value" not in entry:
                yield from figures_of(entry, f"{place}{name}/")


def last_losses(folder: Path) -> dict[str, str]:
    """The last value of each column of metrics.csv, and the smallest `val_loss`; {} where there is none."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {name: f"{float(value):.4g}" for row in rows for name, value in row.items() if value}
    if held_out := [float(row["val_loss"]) for row in rows if row.get("val_loss")]:
        last["smallest val_loss"] = f"{min(held_out):.4g}"
    return last


def read_settings(folder: Path) -> dict:
    """training_config.json of a run; {} where there is none."""
    path = folder / "training_config.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def write_model_card(
    path: Path,
    repo_id: str,
    pipeline: ClassConditionalLDMPipeline,
    run: Path,
    split: Sequence[Mapping],  # rows of split, class, subjects, slices
    synthetic: bool,
    report: Report,
    license: str | None,
    previews: Sequence[str],
) -> None:
    """Write README.md of a model.

    Args:
        run: folder that train_ldm.py wrote.
        synthetic: the data are the phantom cohort, and nobody's scans.
        previews: pictures, relative to the card.
    """
    data = pipeline.unet.config.get("_trained_on") or ()
    settings = {name: value for name, value in read_settings(run).items() if name not in _PLACES}
    card_data = ModelCardData(
        **_licence(license, synthetic),
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=[*TAGS, *(["synthetic-data"] if synthetic else [])],
        model_name=repo_id.split("/")[1],
        eval_results=[_eval_result(name, figure, data) for name, figure in figures_of(report.metrics)]
        or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        repo_id=repo_id,
        classes=list(pipeline.class_embedding.config.class_names),
        sizes=_sizes(pipeline),
        model_hash=hash_pipeline(pipeline),
        data=data,
        split=split,
        settings=settings,
        losses=last_losses(run),
        synthetic=synthetic,
        previews=previews,
        **_judged(report),
    )
    card.save(path)


def write_dataset_card(
    path: Path,
    repo_id: str,
    settings: Mapping,
    count: Mapping[str, int],
    synthetic: bool,
    report: Report,
    license: str | None,
) -> None:
    """Write README.md of drawn slices: `settings` of the drawing, `count` of the slices of each class."""
    card_data = DatasetCardData(
        **_licence(license, synthetic),
        pretty_name=repo_id.split("/")[1],
        task_categories=["image-classification"],
        size_categories=_size_category(sum(count.values())),
        tags=[*TAGS[1:], "synthetic"],
    )
    card = DatasetCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("dataset_card.md")),
        repo_id=repo_id,
        settings=settings,
        count=count,
        synthetic=synthetic,
        **_judged(report),
    )
    card.save(path)


def _judged(report: Report) -> dict:
    words = {True: "good", False: "bad", None: "not known"}
    return {
        "verdicts": {
            question: (words[report.verdict(question)["good"]], report.verdict(question)["text"])
            for question in QUESTIONS
        },
        "figures": [(name, _value(figure), figure) for name, figure in figures_of(report.metrics)],
        "missing": report.missing,
    }


def _value(figure: Mapping) -> str:
    """A figure with its interval: 3.21 (2.9 to 3.6)."""
    low, high = figure.get("low"), figure.get("high")
    around = f" ({low:.4g} to {high:.4g})" if low is not None and high is not None else ""
    return f"{figure['value']:.4g}{around}"


def _eval_result(name: str, figure: Mapping, data: Sequence[Mapping]) -> EvalResult:
    revision = data[-1]["hash"][:16] if data else "not known"
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type="image-folder",
        dataset_name=f"slices, hash {revision}",
        metric_type=name,
        metric_value=figure["value"],
    )


def _licence(license: str | None, synthetic: bool) -> dict:
    license = license or ("apache-2.0" if synthetic else "other")
    if license != "other":
        return {"license": license}
    link = "https://adni.loni.usc.edu"
    return {"license": "other", "license_name": "adni-data-use-agreement", "license_link": link}


def _sizes(pipeline: ClassConditionalLDMPipeline) -> dict[str, str]:
    unet, vae = pipeline.unet.config, pipeline.vae
    side, latent = unet.sample_size * pipeline.vae_scale_factor, unet.sample_size

    def count(module) -> str:
        return f"{sum(tensor.numel() for tensor in module.parameters()):,} weights"

    return {
        "slice": f"1 × {side} × {side}, grey",
        "latent": f"{unet.in_channels} × {latent} × {latent}",
        "autoencoder (AutoencoderKL)": f"{count(vae)}, channels {list(vae.config.block_out_channels)}",
        "U-Net (UNet2DConditionModel)": f"{count(pipeline.unet)}, channels {list(unet.block_out_channels)}",
        "class embedding": f"{count(pipeline.class_embedding)}, tokens {unet.cross_attention_dim} wide",
        "prediction": str(pipeline.scheduler.config.prediction_type),
    }


def _size_category(count: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if count < limit:
            return name
    return "100K<n<1M"
