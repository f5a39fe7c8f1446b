"""Validity of counterfactuals on the synthetic cohort, where the true effect is known: a table by strength.

    python benchmarks/counterfactual.py --run runs/demo [--strengths 0.4 0.6 0.8] [--guidance_scales 1 1.5]

Counterfactuals of held-out subjects (RUN/data/test) of the cohort that the model in RUN/ldm was trained on,
from NC to AD and from AD to NC. The columns are defined below the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from measure import RESULTS, report, table

import numpy as np  # isort: skip
import pandas as pd
import torch
from phantoms import read_test_set, render_again
from tqdm.auto import tqdm

from adni_ldm.evaluation.anatomy import ventricle_area
from adni_ldm.evaluation.estimates import proportion
from adni_ldm.loading import load_pipeline
from adni_ldm.pipeline import Counterfactual
from adni_ldm.preprocessing import phantom

OTHER = {"NC": "AD", "AD": "NC"}
COLUMNS = ("guidance", "strength", "grows to AD", "shrinks to NC", "change, mm²", "same subject", "truth, r")
COLUMNS += ("difference", "error")
LEGEND = (
    "grows, shrinks: share of subjects whose lateral ventricle, by segmentation and as a mean over some "
    "slices, is larger towards AD and smaller towards NC, with Wilson's 95 % interval.",
    "change: mean change of that area towards AD and towards NC.",
    "same subject: share of counterfactuals whose nearest real slice of the test set is of the same subject.",
    "truth: mean correlation of the difference map with the true one, of the same phantom subject rendered "
    "with the mean difference of disease between the groups.",
    "difference, error: mean over all pixels of the difference map and of the round-trip error, of a grey "
    "range of 1.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder with data/ and ldm/")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--guidance_scales", type=float, nargs="+", help="default: the model's own")
    parser.add_argument("--steps", type=int, default=20, help="DDIM steps in each direction")
    parser.add_argument("--slices", type=int, default=3, help="of each subject, evenly over its slices")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    args = parser.parse_args()

    pipeline = load_pipeline(str(args.run / "ldm"))
    pipeline.set_progress_bar_config(disable=True)
    slices, images = read_test_set(args.run / "data")
    numbers = np.unique(slices["slice"])
    wanted = numbers[np.linspace(0, len(numbers) - 1, args.slices + 2).round().astype(int)[1:-1]]
    members = np.flatnonzero(slices["slice"].isin(wanted))
    chosen, given = slices.iloc[members].reset_index(drop=True), images[members]
    truth = (render_again(args.run / "data", chosen, other_disease) - given).numpy()
    area = ventricle_area(given, slices.pixel_mm[0])
    real = area[chosen.label == "AD"].mean() - area[chosen.label == "NC"].mean()
    rows = []
    scales = args.guidance_scales or [pipeline.config.guidance_scale]
    settings = [(scale, strength) for scale in scales for strength in args.strengths]
    for scale, strength in tqdm(settings, desc="strengths", file=sys.stderr):
        result = convert(pipeline, given, chosen.label, strength, args.steps, scale)
        change = ventricle_area(result.images, slices.pixel_mm[0]) - area
        by_subject = chosen.assign(change=change).groupby(["label", "subject"]).change.mean()
        same = nearest_subjects(result.images, images, slices.subject) == chosen.subject.to_numpy()
        alike = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(result.difference.numpy(), truth)]
        cells = [f"{scale:g}", f"{strength:g}", share(by_subject["NC"] > 0), share(by_subject["AD"] < 0)]
        cells += [f"{by_subject['NC'].mean():+.0f}, {by_subject['AD'].mean():+.0f}", f"{same.mean():.0%}"]
        cells += [f"{np.nanmean(alike):.2f}"]
        cells += [f"{result.difference.abs().mean():.4f}", f"{result.error.mean():.4f}"]
        rows.append(cells)
    lines = [
        f"{chosen.subject.nunique()} held-out subjects, {len(chosen)} slices, {args.steps} DDIM steps in "
        f"each direction. Lateral ventricle, AD - NC of the real slices: {real:.0f} mm².",
        "",
        *table(COLUMNS, rows),
        "",
        *(f"- {line}" for line in LEGEND),
    ]
    report("counterfactual", "Counterfactuals", lines, args.results)


def convert(pipeline, given, labels, strength: float, steps: int, guidance_scale: float) -> Counterfactual:
    """Counterfactuals of slices (N, 1, H, W), each under the other class, in the order of the slices."""
    parts = [torch.empty_like(given) for _ in Counterfactual._fields]
    for source, target in OTHER.items():
        members = np.flatnonzero(labels == source)
        result = pipeline.counterfactual(given[members], source, target, strength, steps, guidance_scale)
        for part, of_class in zip(parts, result):
            part[members] = of_class
    return Counterfactual(*parts)


def other_disease(subject: phantom.Subject, label: str) -> phantom.Subject:
    """The same subject with the other group's disease: changed by the difference of the group means."""
    ours, theirs = phantom.SEVERITY[label], phantom.SEVERITY[OTHER[label]]
    names = ("ventricle", "atrophy", "hippocampus")
    changed = {name: getattr(subject, name) + theirs[name][0] - ours[name][0] for name in names}
    return dataclasses.replace(subject, **changed)


def nearest_subjects(images: torch.Tensor, real: torch.Tensor, subjects: pd.Series) -> np.ndarray:
    """Subject of the real slice at the smallest Euclidean distance from each image."""
    distances = torch.cdist(images.flatten(1), real.flatten(1))
    return subjects.to_numpy()[distances.argmin(1).numpy()]


def share(hits: pd.Series) -> str:
    estimate = proportion(int(hits.sum()), len(hits))
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


if __name__ == "__main__":
    main()
