"""The report of evaluate.py: metrics.json, and report.html with everything that it shows inside."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from adni_ldm.evaluation.estimates import Estimate
from adni_ldm.evaluation.questions import QUESTIONS, list_verdicts
from adni_ldm.files import write_text

# What each metric is, and which direction is better, as the tables show it.
LABELS = {
    "kid": "KID: kernel inception distance (0: same distribution; lower is better)",
    "kid_share": "KID ÷ variance of real slices in its kernel's space (lower is better)",
    "precision_ratio": "Precision ÷ reference",
    "recall_ratio": "Recall ÷ reference",
    "density_ratio": "Density ÷ reference",
    "coverage_ratio": "Coverage ÷ reference",
    "fid": "FID: Fréchet inception distance (lower is better; biased by the number of slices)",
    "precision": "Precision: share of samples within the distribution of real slices",
    "recall": "Recall: share of real slices within the distribution of samples",
    "density": "Density: number of real neighborhoods around a sample (about 1 for real slices)",
    "coverage": "Coverage: share of real slices with a sample in their neighborhood",
    "ms_ssim": "MS-SSIM between samples of one class (at the reference: as diverse as real slices)",
    "real": "Real slices",
    "synthetic": "Samples",
    "both": "Real slices and samples",
    "auc": "AUC by subject",
    "balanced_accuracy": "balanced accuracy by subject",
    "relative_auc": "(AUC trained on samples - 0.5) ÷ (AUC trained on real slices - 0.5)",
    "relative": "(accuracy on samples - chance) ÷ (accuracy on real slices - chance)",
    "samples": "Samples ÷ held-out slices, power at the share of Nyquist's frequency",
    "reconstructions": "Reconstructions ÷ held-out slices, power at the share of Nyquist's frequency",
    "class_conditioning_accuracy": "Class-conditioning accuracy",
    "by_guidance": "Class-conditioning accuracy at guidance scale",
    "ventricle_ratio": "Lateral ventricle ÷ brain",
    "ventricle_mm2": "Lateral ventricle, mm²",
    "brain_mm2": "Brain, mm²",
    "border_mm": "Cortical border, mm",
    "blobs_mm2": "Bright areas outside the brain, mm²",
    "intensity": "Mean intensity of the brain, 0 to 1",
    "location": "difference of the means, samples - real, in standard deviations",
    "spread": "standard deviation, samples ÷ real",
    "difference_ratio": "difference of the class means, samples ÷ real",
    "effect_real": "disease effect in real slices (Cohen's d)",
    "effect_synthetic": "disease effect in samples (Cohen's d)",
    "effect_ratio": "effect in samples ÷ effect in real slices",
    "slope": "slope of the predicted value on the one that was asked for",
    "correlation": "correlation (r) of the predicted value with the one that was asked for",
    "error": "mean absolute error of the predicted value",
    "accuracy": "balanced accuracy of the predicted category",
    "slope_ratio": "slope in samples ÷ in held-out real slices",
    "effects": "First class less last",
    "real_plain": "real slices, as they are",
    "real_adjusted": "real slices, at equal conditions",
    "synthetic_plain": "samples, as they are",
    "synthetic_adjusted": "samples, at equal conditions",
    "adjusted_ratio": "at equal conditions, samples ÷ real",
    "matched": "Among subjects with the same conditions, AUC by subject",
    "matched_copies": "Samples classified as copies of a training slice with the same conditions",
    "matched_near_copies": "Samples nearer than any real slice to a training slice with the same conditions",
    "matched_copies_excess": "Samples classified as copies among the same conditions, less the reference",
    "copies": "Samples classified as copies of a training slice",
    "copies_excess": "Samples classified as copies, less the reference",
    "subjects_copied": "Training subjects with at least one copy",
    "membership_auc": "AUC of membership inference from the model's loss (0.5: chance)",
}
SECTIONS = {  # section of metrics.json: (heading, what is measured)
    "fidelity": (
        QUESTIONS["fidelity"],
        "Samples and held-out real slices are compared in the feature space of a network. The reference is "
        "the value of equally many real slices of the training subjects in the samples' place.",
    ),
    "tstr": (
        QUESTIONS["usefulness"],
        "One classifier is trained on real slices, on samples, and on both, and tested on held-out subjects "
        "that neither the classifier nor the generator was trained on. The reference is training on real "
        "slices.",
    ),
    "conditioning": (
        QUESTIONS["faithfulness"],
        "Class-conditioning accuracy is the share of samples that a classifier trained on real slices "
        "assigns to the class they were conditioned on. The reference is its accuracy on held-out slices.",
    ),
    "conditions": (
        "Conditions: do samples show what was asked for beside the class?",
        "A network trained on real slices predicts the conditions; the reference is what it reaches on "
        "held-out slices. The difference between the first and the last class is given as it is, and at "
        "equal conditions, by a linear model (analysis of covariance).",
    ),
    "anatomy": (
        "Anatomy: is the effect of the disease preserved?",
        "Areas are measured in real slices, training and held-out, and samples by the same segmentation. The "
        "disease effect is the difference between the first and the last class in pooled standard deviations "
        "(Cohen's d).",
    ),
    "privacy": (
        QUESTIONS["privacy"],
        "A sample is classified as a copy if it is nearer to a training slice than real slices of held-out "
        "subjects are, except for a stated share of false positives. The reference is the share of held-out "
        "slices classified as copies.",
    ),
    "spectrum": (
        "Sharpness: do samples have the power of real slices at every spatial frequency?",
        "Power in three bands of the radially averaged spectrum, relative to held-out real slices. What the "
        "reconstructions lack, the autoencoder has lost; what samples lack besides, the denoiser.",
    ),
    "figures": ("Figures", ""),
}


@dataclass(frozen=True)
class ReportFigure:
    """A PNG of the report."""

    section: str  # of SECTIONS
    path: Path
    caption: str  # also the alternative text for screen readers


class FigureFolder:
    """The folder of the report's figures, in the order in which they are shown."""

    def __init__(self, folder: str | Path):
        self.folder, self.figures = Path(folder), []
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, name: str, caption: str) -> Path:
        """Register a figure; returns the path to write it to."""
        path = self.folder / f"{name.replace(' ', '_')}.png"
        self.figures.append(ReportFigure(section, path, caption))
        return path


def write_metrics(path: str | Path, metrics: Mapping) -> None:
    """metrics.json, of which every Estimate becomes {"value": …, "low": …, "high": …, "reference": …}."""
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False, default=Estimate.to_json)
    write_text(path, text + "\n")


def write_html(
    path: str | Path, metrics: Mapping, figures: Sequence[ReportFigure], facts: Mapping[str, str]
) -> None:
    """report.html: one page that needs no other file.

    Args:
        metrics: as in `write_metrics`; "verdicts" holds {question: {"good": …, "text": …}}.
        facts: what was compared, {name: text}, shown beneath the verdicts.
    """
    sections = [
        {
            "name": name,
            "heading": heading,
            "text": text,
            "rows": list(_rows(metrics.get(name, {}))),
            "figures": [
                {"data": base64.b64encode(figure.path.read_bytes()).decode(), "caption": figure.caption}
                for figure in figures
                if figure.section == name
            ],
        }
        for name, (heading, text) in SECTIONS.items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    environment.filters["number"] = lambda value: "–" if value is None else _number(value)
    page = environment.get_template("report.html.jinja").render(
        verdicts=list(list_verdicts(metrics)), sections=sections, facts=facts
    )
    write_text(path, page)


def _rows(results: Mapping, keys: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """A row of a table for each Estimate of a nested mapping."""
    for name, result in results.items():
        if isinstance(result, Mapping):
            yield from _rows(result, (*keys, name))
        elif isinstance(result, Estimate):
            interval = [] if result.low is None else [_number(result.low), _number(result.high)]
            yield {
                "metric": _label((*keys, name)),
                "value": "–" if result.value is None else _number(result.value),
                "interval": " to ".join(interval),
                "reference": "" if result.reference is None else _number(result.reference),
                "note": result.note,
            }


def _label(keys: tuple[str, ...]) -> str:
    words = [LABELS.get(key) or str(key).removeprefix("copies_") for key in keys if key != "all"]
    if keys[0].startswith("copies_") and keys[0] not in LABELS:
        words.insert(0, LABELS["copies"])
    return " · ".join(words)


def _number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
