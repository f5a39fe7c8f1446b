"""Conditions on known truth: do samples show the age, sex and position that were asked for, and is the effect
of the class then that at equal age?

    python benchmarks/conditions.py [--work runs/conditions] [--subjects 400]
    python benchmarks/conditions.py --work runs/conditions_long --max_steps 1700 2600

A phantom cohort in which age widens the ventricles, sex scales the brain, and AD is 8 years older; one
autoencoder; and two diffusion models by the demo's preset, with and without --conditions age sex slice_mm.
Samples of the conditioned model are asked for twice: by the conditions of test slices, in each class those of
its own (the real mix), and by those of all test slices in both classes (equal conditions).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from measure import DEVICE, RESULTS, flags, interleaved, report, run, table

import numpy as np  # isort: skip
import pandas as pd
import torch
from held_out import FEATURES, HeldOutMetrics

from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.evaluation.anatomy import measure_anatomy
from adni_ldm.evaluation.covariates import describe_real, predictions, rows_of, train_predictor
from adni_ldm.evaluation.estimates import Resamples
from adni_ldm.evaluation.image_sets import ImageSet, load_samples, read_sample_table, real_set
from adni_ldm.loading import load_pipeline
from adni_ldm.models import ConditionalDenoiser
from adni_ldm.training.losses import diffusion_loss

CONDITIONS = ["age", "sex", "slice_mm"]
AGE_GAP = 8
COHORT = {"slices": 10, "image_size": 64, "covariate_effects": "true", "age_gap": AGE_GAP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/conditions"), help="folder of the runs")
    parser.add_argument("--subjects", type=int, default=400, help="subjects of the cohort")
    parser.add_argument("--samples", type=int, default=500, help="samples of each class")
    parser.add_argument("--max_steps", type=int, nargs=2, help="of VAE and LDM, for the demo's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()

    cohort, models = train(options)
    listing = open_folder(cohort, conditions=CONDITIONS)
    splits = read_slices(listing)
    sets = {name: real_set(splits[name], COHORT["image_size"]) for name in ("train", "test")}
    truth = pd.concat(pd.read_csv(path) for path in sorted(cohort.glob("*/metadata.csv")))
    asked = ask_for_samples(options, cohort, models)
    lines = [
        f"{options.subjects} subjects of {COHORT['slices']} slices at {COHORT['image_size']} px, AD "
        f"{AGE_GAP} years older; the demo's presets"
        + (f" with {options.max_steps[0]} and {options.max_steps[1]} updates" if options.max_steps else "")
        + f"; {options.samples} samples of each class; seed 0. Intervals: 95 %, bootstrap over subjects, or "
        "over samples.",
        "",
        *table(("measure", "samples ÷ truth, or as named", "real slices, by segmentation", "mark"), [
            *effects(asked, sets["train"], truth, cohort),
            positions(asked["mix"], sets),
        ]),
        "",
        *table(("samples", "KID × 1000", "precision", "recall", "AD − NC, mm²"), fidelity(asked, cohort)),
        "",
    ]  # fmt: skip
    lines += [
        f"A training step takes {step_time(models):.3f} times as long with conditions (U-Net and loss, "
        "forward and backward, batch 16; median of 15 rounds in turn).",
        "",
    ]
    name = f"conditions_{options.max_steps[1]}_updates" if options.max_steps else "conditions"
    report(name, "Conditions", [*lines, f"- {FEATURES}"], options.results)


# ---- Training and sampling ---------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> tuple[Path, dict[str, Path]]:
    """The cohort, and the models with and without conditions; what exists is kept."""
    work, cohort = options.work, options.work / "data"
    steps = [{"max_steps": count} for count in options.max_steps] if options.max_steps else [{}, {}]
    if not cohort.is_dir():
        settings = {"output_dir": cohort, "subjects": options.subjects, **COHORT}
        run([sys.executable, "prepare_data.py", "phantom", *flags(settings)])
    vae = work / "vae"
    recipe(vae, "vae", {"data_dir": cohort, **steps[0]})
    models = {"without conditions": work / "plain", "with conditions": work / "conditioned"}
    for name, model in models.items():
        given = {"conditions": CONDITIONS} if name == "with conditions" else {}
        recipe(model, "ldm", {"data_dir": cohort, "vae": vae, **given, **steps[1]})
    return cohort, models


def recipe(output_dir: Path, stage: str, settings: dict) -> None:
    """Train by the demo's preset, unless it has been trained."""
    if not (output_dir / "model_index.json").is_file() and not (output_dir / "config.json").is_file():
        words = flags({"config": f"configs/demo/{stage}.yaml", "output_dir": output_dir, **settings})
        run([sys.executable, f"train_{stage}.py", *words])


def ask_for_samples(
    options: argparse.Namespace, cohort: Path, models: dict[str, Path]
) -> dict[str, ImageSet]:
    """Samples of the model without conditions ("plain"), and of that with conditions in the "mix" of each
    class's test slices, and "equal", both classes in that of all test slices."""
    work = options.work
    pooled = pd.read_csv(cohort / "test/metadata.csv")[CONDITIONS]
    pooled = pooled.assign(age=pooled.age.clip(upper=90))
    pooled.sample(options.samples, replace=True, random_state=0).to_csv(work / "rows.csv", index=False)
    ways = {
        "plain": {"model": models["without conditions"]},
        "mix": {"model": models["with conditions"], "match": cohort, "match_split": "test"},
        "equal": {"model": models["with conditions"], "conditions": work / "rows.csv"},
    }
    found = {}
    for name, settings in ways.items():
        folder = work / f"samples_{name}"
        words = {"num_images": options.samples, "output_dir": folder, "extrapolate": "true", **settings}
        run([sys.executable, "sample.py", "--class", "all", *flags(words)])
        columns = read_sample_table(folder)
        asked = columns[[condition for condition in CONDITIONS if condition in columns]]
        found[name] = load_samples(folder, ("AD", "NC"), conditions=asked)
    return found


# ---- Against the truth -------------------------------------------------------------------------------------


def effects(
    asked: dict[str, ImageSet], real: ImageSet, truth: pd.DataFrame, cohort: Path
) -> list[tuple[str, ...]]:
    """Rows on age, class and sex: regressions of areas on what was asked for, samples ÷ truth."""
    pixel_mm = truth.pixel_mm.iloc[0]
    areas = {name: measure_anatomy(one.floats(), pixel_mm, progress=True) for name, one in asked.items()}
    of_real = measure_anatomy(real.floats(), pixel_mm, progress=True)
    known = pd.DataFrame({"label": truth.label, "subject": truth.subject, **truth[CONDITIONS]})
    rows = []

    def measured(name: str) -> tuple:
        return as_table(asked[name]), asked[name].subjects

    in_real = as_table(real), real.subjects
    for title, measure, column, mark in (
        ("slope of the ventricle on age, mm² a year", "ventricle_mm2", "age", "0.8 to 1.25"),
        ("brain of men less women, mm²", "brain_mm2", "sex", "0.8 to 1.25"),
    ):
        expected, _ = regression(known, truth.subject.to_numpy(), truth[measure].to_numpy(), column)
        found, r = regression(*measured("equal"), areas["equal"][measure], column)
        seen, r_real = regression(*in_real, of_real[measure], column)
        rows.append((title, *(ratio(one, expected[0]) for one in (found, seen)), mark))
        if column == "age":
            rows.append(("partial correlation r with age", f"{r:.2f}", f"{r_real:.2f}", "≥ 0.6"))

    equal_age = truth.groupby("label").ventricle_mm2_mean_age.mean()
    expected = equal_age.AD - equal_age.NC
    for title, name, mark in (
        ("AD − NC of the ventricle at equal age, with conditions", "equal", "0.85 to 1.15"),
        ("AD − NC of the ventricle, without conditions", "plain", "off by the gap's share"),
    ):
        if name in asked:
            found = difference(asked[name], areas[name]["ventricle_mm2"])
            rows.append((title, ratio(found, expected), "–", mark))
    plain = truth.groupby("label").ventricle_mm2.mean()
    share = (plain.AD - plain.NC) / expected
    rows.append(("the same of the cohort: as it is ÷ at equal age", f"{share:.2f}", "–", "–"))
    return rows


def as_table(images: ImageSet) -> pd.DataFrame:
    """Label and conditions of an image set, numbers as such."""
    names = np.array(images.class_names)[images.labels]
    found = pd.DataFrame({"label": names, **images.conditions})
    return found.assign(**{name: pd.to_numeric(found[name]) for name in ("age", "slice_mm")})


def regression(
    known: pd.DataFrame, subjects: np.ndarray, values: np.ndarray, column: str
) -> tuple[np.ndarray, float]:
    """Draws (B + 1,) of the coefficient of `column` in a linear model of values on class, age, sex and
    position, and the partial correlation of values and `column` given the others.

    Position enters up to its fourth power: the ventricle's area has two maxima from left to right.
    """
    z = known.slice_mm.to_numpy() / 24
    columns = {
        "age": known.age.to_numpy(float),
        "sex": (known.sex == "M").to_numpy(float),
        "label": (known.label == "AD").to_numpy(float),
    }
    own = columns.pop(column)
    others = np.column_stack([np.ones(len(z)), *columns.values(), *(z**power for power in range(1, 5))])
    x, y = (one - others @ np.linalg.lstsq(others, one, rcond=None)[0] for one in (own, values))
    resamples = Resamples.draw(subjects, 1000, 0)  # Frisch, Waugh and Lovell: residual on residual
    return resamples.sum(x * y) / resamples.sum(x * x), float(np.corrcoef(x, y)[0, 1])


def difference(images: ImageSet, values: np.ndarray) -> np.ndarray:
    """Draws (B + 1,) of AD − NC."""
    one, other = (
        Resamples.draw(images.subjects[images.labels == label], 1000, label).mean(
            values[images.labels == label]
        )
        for label in (0, 1)
    )
    return one - other


def ratio(draws: np.ndarray, truth: float) -> str:
    """Draws ÷ truth, with their 95 % interval."""
    low, high = np.quantile(draws[1:] / truth, [0.025, 0.975])
    return f"{draws[0] / truth:.2f} ({low:.2f} to {high:.2f})"


def positions(samples: ImageSet, sets: dict[str, ImageSet]) -> tuple[str, ...]:
    """Row on the position that a network reads off slices: mean absolute error, samples and real.

    Left and right of the mid-plane look alike, so the network learns the distance from it.
    """
    train, samples, held_out = (distances(one) for one in (sets["train"], samples, sets["test"]))
    about = describe_real(train)
    predictor = train_predictor(about, train, device=DEVICE, steps=400)
    errors = [
        np.abs(predictions(predictor, one, about) - rows_of(one, about)).mean() for one in (samples, held_out)
    ]
    title = "distance from the mid-plane: mean error, mm (samples; held-out slices)"
    return title, f"{errors[0]:.2f}, {errors[0] / errors[1]:.2f} times", f"{errors[1]:.2f}", "≤ 1.5 times"


def distances(images: ImageSet) -> ImageSet:
    """The set with the distance of each slice from the mid-plane, mm, as its one condition."""
    x = images.conditions["slice_mm"].astype(float)
    return replace(images, conditions={"distance_mm": np.abs(x).astype(str)})


def fidelity(asked: dict[str, ImageSet], cohort: Path) -> list[tuple[str, ...]]:
    """Rows on KID and recall of the samples with and without conditions, against the test split."""
    metrics = HeldOutMetrics(cohort, COHORT["image_size"], len(asked["mix"]))
    rows = [("real training slices (reference)", *metrics.reference())]
    for title, name in (("without conditions", "plain"), ("with conditions, real mix", "mix")):
        if one := asked.get(name):
            rows.append((title, *metrics.cells(one.floats(), one.subjects, one.labels)))
    return rows


def step_time(models: dict[str, Path], rounds: int = 15) -> float:
    """Seconds of forward and backward with conditions ÷ without; median of the ratios of each round."""
    calls = {}
    for name, folder in models.items():
        pipeline = load_pipeline(str(folder)).to(DEVICE)
        denoiser = ConditionalDenoiser(
            pipeline.unet, pipeline.class_embedding, pipeline.condition_embedding
        ).train()
        config, count = pipeline.unet.config, 16
        clean = torch.randn(count, config.in_channels, config.sample_size, config.sample_size, device=DEVICE)
        noise, labels = torch.randn_like(clean), torch.zeros(count, dtype=torch.long, device=DEVICE)
        timesteps = torch.randint(1000, (count,), device=DEVICE)
        given = None
        if pipeline.condition_embedding is not None:
            asked = {"age": 75, "sex": "F", "slice_mm": 5}
            given = pipeline.condition_embedding.rows_of(asked, count).to(DEVICE)
        scheduler = pipeline.scheduler

        def step(denoiser=denoiser, clean=clean, noise=noise, labels=labels, timesteps=timesteps,
                 given=given, scheduler=scheduler):  # fmt: skip
            prediction = denoiser(clean, timesteps, labels, given)
            diffusion_loss(prediction, clean, noise, timesteps, scheduler).backward()

        calls[name] = step
    seconds = interleaved(calls, rounds)
    pairs = zip(seconds["with conditions"], seconds["without conditions"], strict=True)
    return statistics.median(one / other for one, other in pairs)


if __name__ == "__main__":
    main()
