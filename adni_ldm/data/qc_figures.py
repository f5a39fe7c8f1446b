"""QC figures of a data folder: contact sheets, histograms, near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from adni_ldm.data.folder import SliceFile
from adni_ldm.data.qc import QCReport
from adni_ldm.data.slices import evenly_spaced, prepare_image, read_image
from adni_ldm.figures import save_histograms, save_rows

SIDE = 160  # of a slice, pixels
COLUMNS = 8


def save_qc_figures(report: QCReport, folder: str | Path) -> list[Path]:
    """Save the figures of a report to `folder`, which is created. Returns their paths, [] without images.

    contact_sheet.png: three rows of slices per class, evenly over its subjects and over their slices.
    histograms.png: intensities per class (0 to 255, without the black background) and, where known, ages, one
    per subject. near_duplicates.png, if there are any: pairs of slices above each other.
    """
    if not report.files:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    by_class = {
        cls: [file for file in report.files if file.label == label]
        for label, cls in enumerate(report.class_names)
    }
    by_class = {cls: files for cls, files in by_class.items() if files}

    sheet = {cls: _load_images(_choose(files, 3 * COLUMNS)) for cls, files in by_class.items()}
    save_rows(folder / "contact_sheet.png", sheet, columns=COLUMNS)
    save_histograms(folder / "histograms.png", _histograms(report, by_class))
    if report.near:
        pairs = report.near[:COLUMNS]
        rows = {"first": [pair.first for pair in pairs], "second": [pair.second for pair in pairs]}
        path = folder / "near_duplicates.png"
        save_rows(path, {title: _load_images(files) for title, files in rows.items()}, columns=COLUMNS)
    names = ("contact_sheet.png", "histograms.png", "near_duplicates.png")
    return [folder / name for name in names[: 3 if report.near else 2]]


def _choose(files: Sequence[SliceFile], most: int) -> list[SliceFile]:
    """Choose files evenly over the subjects and, from one to the next, over a subject's slices."""
    by_subject: dict[str | None, list[SliceFile]] = {}
    for file in sorted(files, key=lambda file: (file.slice or 0, file.path)):
        by_subject.setdefault(file.subject, []).append(file)
    subjects = sorted(by_subject, key=str)
    chosen = evenly_spaced(len(subjects), most)
    places = np.linspace(0, 1, COLUMNS)  # across a row: from the first to the last slice
    picked = []
    for position, index in enumerate(chosen):
        slices = by_subject[subjects[index]]
        picked.append(slices[round(places[position % COLUMNS] * (len(slices) - 1))])
    return picked


def _load_images(files: Sequence[SliceFile]) -> torch.Tensor:
    """(n, 1, H, W) in [0, 1]."""
    images = np.stack([prepare_image(read_image(file.path), SIDE) for file in files])
    return torch.from_numpy(images)[:, None] / 255


def _histograms(report: QCReport, by_class: dict[str, list[SliceFile]]) -> dict:
    """Panels for `save_histograms`: {title: {class: (edges, shares)}}."""
    edges = np.arange(0, 257, 4)
    intensities = {}
    for cls, counts in report.intensities.items():
        counts = counts.copy()
        counts[:4] = 0  # the background, and what JPEG makes of it
        intensities[cls] = (edges, counts.reshape(-1, 4).sum(1) / max(1, counts.sum()))
    panels = {"intensity, 0 to 255, without the background": intensities}

    ages = {
        cls: list({file.subject: file.age for file in files if file.age is not None}.values())
        for cls, files in by_class.items()
    }
    known = {f"{cls} (n = {len(years)})": years for cls, years in ages.items() if years}
    if known:
        everyone = [age for years in known.values() for age in years]
        edges = np.arange(5 * (min(everyone) // 5), max(everyone) + 5.01, 5)
        panels["age, years, one per subject"] = {
            cls: (edges, np.histogram(years, edges)[0] / len(years)) for cls, years in known.items()
        }
    return panels
