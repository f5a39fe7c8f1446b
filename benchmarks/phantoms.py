"""Slices of a phantom cohort rendered again with one change: the truth that is unknown for real subjects."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm.auto import tqdm

from adni_ldm.data.slices import to_float
from adni_ldm.preprocessing.phantom import (
    CENTRE_MM,
    NORMAL_AXIS,
    Subject,
    cohort_subject,
    disease_field,
    render_slice,
    slice_positions,
)
from adni_ldm.preprocessing.phantom_atlas import load_atlas


def read_test_set(cohort: Path) -> tuple[pd.DataFrame, torch.Tensor]:
    """Read the rows of metadata.csv of the test split, and their slices (N, 1, H, W) in [-1, 1]."""
    slices = pd.read_csv(cohort / "test/metadata.csv")
    pixels = np.stack([np.asarray(Image.open(cohort / "test" / name)) for name in slices.file_name])
    return slices, to_float(torch.from_numpy(pixels)[:, None])


def render_again(
    cohort: Path, slices: pd.DataFrame, change: Callable[[Subject, str], Subject]
) -> torch.Tensor:
    """Render rows of metadata.csv as slices (N, 1, H, W) in [-1, 1] of the subjects that `change` returns.

    `change` takes the subject and its class. Slice positions and random numbers are unchanged.
    """
    settings = json.loads((cohort / "manifest.json").read_text())["settings"]
    atlas, seed, size, view = load_atlas(), *(settings[name] for name in ("seed", "image_size", "plane"))
    positions = slice_positions(settings["slices"]) + CENTRE_MM[NORMAL_AXIS[view]]  # metadata.csv rounds them
    rendered = []
    for row in tqdm(slices.itertuples(), total=len(slices), desc="rendering the truth", file=sys.stderr):
        index = int(row.subject.partition("p")[2])
        subject = change(cohort_subject(settings, index), row.label)
        rng = np.random.default_rng(np.random.SeedSequence([seed, index, row.slice]))
        field, position = disease_field(subject, atlas), float(positions[row.slice]) + subject.x_offset
        rendered.append(
            render_slice(subject, field, position, size, rng, atlas, view, settings["contrast"])[0]
        )
    return to_float(torch.from_numpy(np.stack(rendered))[:, None])
