"""Conditions: columns of a study, such as age and sex, as numbers for `ConditionEmbedding`.

about = describe_conditions(train.conditions)          # numbers and categories, by the training slices
rows = condition_rows(about, train.conditions)         # (N, K), NaN where missing
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from adni_ldm.data.folder import FolderListing
from adni_ldm.data.sample_folder import SAMPLE_COLUMNS
from adni_ldm.data.splits import DataError
from adni_ldm.data.study_table import COLUMNS
from adni_ldm.errors import UserError

MOST_CATEGORIES = 32
OLDEST = 90.0  # HIPAA's safe harbor (45 CFR 164.514) joins all ages above 89
# Of metadata.csv of a counterfactual, beside SAMPLE_COLUMNS.
TRANSITION_COLUMNS = ("from", "to", "from_image", "strength", "difference", "colour_limit")
TRANSITION_COLUMNS += ("round_trip_error", "round_trip_error_max")


def describe_conditions(columns: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """Describe columns of text {name: values}, "" where missing, as `ConditionEmbedding` takes it.

    A column of which every value is a number is one; ages above 89 count as 90.

    Raises DataError for a column without two different values, text with more than MOST_CATEGORIES, or a
    name that sample.py's metadata.csv has a column of already.
    """
    described: dict[str, dict] = {}
    for name, values in columns.items():
        if name in SAMPLE_COLUMNS + TRANSITION_COLUMNS:
            raise DataError(
                f"--conditions {name}: samples have a column of that name on how they were made; rename it"
            )
        values = [value for value in values if value]
        numbers = [_as_number(name, value) for value in values]
        if len(set(values if None in numbers else numbers)) < 2:
            raise DataError(
                f"--conditions {name}: the same in all training slices, or missing in them; leave it out"
            )
        if None not in numbers:
            numbers = torch.tensor(numbers, dtype=torch.float64)
            about = {"mean": numbers.mean().item(), "std": numbers.std(correction=0).item()}
            described[name] = {**about, "low": numbers.min().item(), "high": numbers.max().item()}
            continue
        categories = sorted(set(values))
        if len(categories) > MOST_CATEGORIES:
            text = next(value for value, number in zip(values, numbers) if number is None)
            raise DataError(
                f"--conditions {name}: text with {len(categories)} different values, such as {text!r}; give "
                f"a column of numbers, or of at most {MOST_CATEGORIES} categories"
            )
        described[name] = {"categories": categories}
    return described


def condition_rows(
    conditions: Mapping[str, Mapping], columns: Mapping[str, Sequence[str]], count: int
) -> torch.Tensor:
    """Convert columns of `count` slices to (count, K) float32: numbers, and indices of categories.

    NaN is a missing value, or a category that `conditions` does not have.
    """
    rows = torch.full((count, len(conditions)), math.nan)
    for column, (name, about) in enumerate(conditions.items()):
        known = {category: index for index, category in enumerate(about.get("categories", ()))}
        for row, value in enumerate(columns.get(name, ())):
            number = known.get(value) if "categories" in about else _as_number(name, value)
            rows[row, column] = math.nan if number is None else number
    return rows


def _as_number(name: str, text: str) -> float | None:
    try:
        number = float(text.removesuffix("+") if _is_age(name) else text)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return OLDEST if _is_age(name) and number > OLDEST - 1 else number


def _is_age(name: str) -> bool:
    """Whether a column is of ages, by any of its usual names: Age, age_at_scan, AgeAtScan, Subject Age."""
    words = re.split("[^a-z]+", name.lower())
    return "age" in words or "".join(words) in COLUMNS["age"]


def asked_conditions(given: Sequence[str], count: int) -> dict[str, list[str]]:
    """The values {name: one for each of `count` images} of --conditions: NAME=VALUE …, or a CSV file.

    The file has a column for each condition and a row for each image, at least `count` of them. Raises
    UserError for a word without "=", a condition given twice, a file that cannot be read, or too few rows.
    """
    if _is_table(given):
        path = Path(given[0])
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False).fillna("")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--conditions {path}: not a CSV file ({' '.join(str(error).split())})"
            ) from error
        if len(table) < count:
            raise UserError(f"--conditions {path}: {len(table)} rows for {count} images of each class")
        table = table.rename(columns=str.strip)
        return {name: [value.strip() for value in table[name][:count]] for name in table}
    found: dict[str, list[str]] = {}
    for word in given:
        name, equals, value = (part.strip() for part in word.partition("="))
        if not (name and equals):
            raise UserError(f"--conditions {word}: give NAME=VALUE, such as age=75, or a CSV file")
        if name in found:
            raise UserError(f"--conditions {word}: {name} is given twice")
        found[name] = [value] * count
    return found


def _is_table(given: Sequence[str]) -> bool:
    """Whether the words of --conditions are the path of a CSV file."""
    return len(given) == 1 and given[0].lower().endswith(".csv")


def swept_conditions(sweep: str, given: Sequence[str]) -> dict[str, list[str]]:
    """The condition and the values {name: values} of --sweep NAME=LOW:HIGH:COUNT, or NAME=VALUE,VALUE,….

    `given` are the words of --conditions, for the other conditions. Raises UserError for a text of another
    form, fewer than two different values, a condition that `given` has too, or a CSV file there: a sweep is
    one brain, of which all else stays the same.
    """
    name, _, text = sweep.partition("=")
    try:
        low, high, count = text.split(":")
        ends, count = [float(low), float(high)], int(count)
        finite = all(map(math.isfinite, ends))
        values = [f"{value:g}" for value in np.linspace(*ends, count)] if finite else []
    except ValueError:
        values = [] if ":" in text else [value.strip() for value in text.split(",")]
    if not name or len(set(values)) < 2 or not all(values):
        raise UserError(
            f"--sweep {sweep}: give NAME=LOW:HIGH:COUNT, such as age=55:90:8, or categories, such as sex=F,M"
        )
    if _is_table(given):
        raise UserError(
            f"--sweep {sweep}: a sweep is one brain; give --conditions NAME=VALUE, not a CSV file"
        )
    if name in asked_conditions(given, 1):
        raise UserError(f"--sweep {sweep}: --conditions has {name} as well; leave it out there")
    return {name: values}


def matched_conditions(
    listing: FolderListing, split: str, count: int, seed: int
) -> dict[str, dict[str, list[str]]]:
    """The joint conditions {class: {name: values}} of `count` slices of a split, drawn with replacement.

    The samples then have the covariates of real slices, in each class those of its own. Raises UserError for
    a class without slices in the split.
    """
    found = {}
    for label, name in enumerate(listing.class_names):
        files = [file for file in listing.files if file.split == split and file.label == label]
        if not files:
            raise UserError(f"--match {listing.root}: no slices of class {name} in its split {split}")
        rows = np.random.default_rng([seed, label]).integers(len(files), size=count)
        chosen = [files[row].conditions for row in rows]
        found[name] = {
            column: [_capped(column, one[column]) for one in chosen] for column in listing.conditions
        }
    return found


def _capped(name: str, value: str) -> str:
    value = value.strip()
    number = _as_number(name, value) if _is_age(name) else None
    return f"{number:g}" if number == OLDEST else value
