"""The report: metrics.json for programs, report.html for people."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from adni_ldm.evaluation.estimates import Estimate

# What each figure is, its unit and what is better, as the tables say it.
WORDS = {
    "kid": "KID, kernel distance of the features (0 is the same; lower is better)",
    "fid": "FID, Fréchet distance of the features (lower is better; biased by the number of pictures)",
    "precision": "Precision: share of samples that lie among real slices",
    "recall": "Recall: share of real slices that lie among samples",
    "density": "Density: how deep among real slices the samples lie (1 is as real ones)",
    "coverage": "Coverage: share of real slices with a sample near them",
    "ms_ssim": "MS-SSIM between samples of one class (as low as real ones: as diverse)",
    "auc": "AUC of telling the classes apart, by subject",
    "balanced_accuracy": "balanced accuracy, by subject",
    "auc_ratio": "AUC trained on samples ÷ trained on real",
    "agreement": "Samples that an independent classifier takes for the class asked for",
    "by_guidance": "The same, by guidance scale",
    "effect_real": "Effect of the disease in real slices (Cohen's d)",
    "effect_synthetic": "Effect of the disease in samples (Cohen's d)",
    "effect_ratio": "Effect in samples ÷ effect in real slices",
    "copies": "Samples that are copies of a training slice",
    "copies_AD": "of AD",
    "copies_NC": "of NC",
    "subjects_copied": "Training subjects of whom a sample is a copy",
    "membership_auc": "AUC of telling training subjects by the model's loss (0.5: it cannot)",
}
QUESTIONS = {  # section: (heading, what it asks and how to read it)
    "fidelity": (
        "Do the samples match real slices?",
        "Both are turned into features, and the two clouds of features are compared. The floor is what other "
        "real people's slices, as many, reach in their place: no samples can be expected to do better.",
    ),
    "usefulness": (
        "Can a classifier be trained on them?",
        "One network is trained three times, on real slices, on samples, and on both, and tested on people "
        "that neither it nor the generator has seen.",
    ),
    "faithfulness": (
        "Does AD look like AD?",
        "A classifier trained on real slices alone says what it takes each sample for. The floor is how "
        "often it is right about real slices of people it has not seen.",
    ),
    "anatomy": (
        "Does the disease change the same anatomy by as much?",
        "Areas measured in the pictures by one plain segmentation, real and synthetic alike. The effect is "
        "the difference of the first class and the last in units of their spread.",
    ),
    "privacy": (
        "Are patients' brains kept out of them?",
        "For each sample the nearest training slice is looked up. It counts as a copy when it lies nearer "
        "than slices of people who were not trained on ever lie, but for the share that the floor states.",
    ),
}


@dataclass(frozen=True)
class Picture:
    """A PNG of the report."""

    section: str  # of QUESTIONS, or "pictures"
    path: Path
    caption: str  # what is seen, in words: it is the text for those who do not see it as well


class Gallery:
    """The folder that the report's pictures are written to, in the order in which they are shown."""

    def __init__(self, folder: str | Path):
        self.folder, self.pictures = Path(folder), []
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, section: str, name: str, caption: str) -> Path:
        """Where the picture `name` is to be written."""
        path = self.folder / f"{name.replace(' ', '_')}.png"
        self.pictures.append(Picture(section, path, caption))
        return path


def write_metrics(path: str | Path, metrics: Mapping) -> None:
    """metrics.json: nested dicts whose leaves are Estimates or plain values. Never a NaN in it."""
    text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False, default=Estimate.to_json)
    Path(path).write_text(text + "\n", encoding="utf-8")


def write_page(path: str | Path, metrics: Mapping, pictures: Sequence[Picture], facts: Mapping) -> None:
    """report.html: one page that needs no other file.

    Args:
        metrics: what `write_metrics` takes; under "verdicts" {question: {"good": …, "text": …}}.
        facts: what was compared with what, {name: text}, shown beneath the verdicts.
    """
    sections = [
        {
            "name": name,
            "heading": heading,
            "text": text,
            "rows": list(_rows(metrics.get(name, {}))),
            "pictures": [_shown(picture) for picture in pictures if picture.section == name],
        }
        for name, (heading, text) in QUESTIONS.items()
    ]
    verdicts = [
        {"name": name, "heading": QUESTIONS[name][0], **verdict}
        for name, verdict in metrics["verdicts"].items()
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        verdicts=verdicts,
        sections=sections,
        facts=facts,
        pictures=[_shown(picture) for picture in pictures if picture.section == "pictures"],
    )
    Path(path).write_text(page, encoding="utf-8")


def _rows(results: Mapping, place: tuple[str, ...] = ()) -> Iterator[dict[str, str]]:
    """A line of a table for each Estimate, however deep it lies."""
    for name, result in results.items():
        if isinstance(result, Mapping):
            yield from _rows(result, (*place, name))
        elif isinstance(result, Estimate):
            words = [WORDS.get(part, str(part)) for part in (*place, name) if part != "all"]
            yield {
                "what": " · ".join(words),
                "value": show(result),
                "interval": "" if result.low is None else f"{_number(result.low)} to {_number(result.high)}",
                "floor": "" if result.floor is None else _number(result.floor),
                "note": result.note,
            }


def show(estimate: Estimate) -> str:
    """The figure in three digits, or a dash where there is none."""
    return "–" if estimate.value is None else _number(estimate.value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _shown(picture: Picture) -> dict[str, str]:
    return {
        "data": base64.b64encode(picture.path.read_bytes()).decode(),
        "caption": picture.caption,
    }
