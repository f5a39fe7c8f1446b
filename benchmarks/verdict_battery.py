"""The verdicts of evaluate.py on samples with planted faults, made of slices of the phantom.

    python benchmarks/verdict_battery.py --work /tmp/battery --output benchmarks/results/verdict_battery.md

Cohorts of 200 phantom subjects of 10 slices at 64 pixels: one to train, one held out, one that the
autoencoder was trained on before, and 1,000 fresh subjects of one slice each, the samples of a perfect
model. The pipeline is barely trained: it carries the training records, and membership inference has a model
to test. The report is that of evaluate.py, one run a row; what rows have in common (the classifier of real
slices, the search for held-out slices) is computed once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import evaluate  # noqa: E402
from adni_ldm.evaluation import (  # noqa: E402
    anatomy,
    classifier,
    model_outputs,
    nearest_neighbors,
    privacy,
    tstr,
)
from adni_ldm.evaluation.questions import QUESTIONS  # noqa: E402
from adni_ldm.generation import hash_pipeline, hash_weights  # noqa: E402
from adni_ldm.preprocessing import phantom  # noqa: E402
from adni_ldm.preprocessing.phantom_atlas import load_atlas  # noqa: E402

SIZE, SLICES, SUBJECTS = 64, 10, 200
CLASSES = phantom.CLASSES
ANSWERS = {True: "yes", False: "no", None: "inconclusive"}
EXPECTED = {  # fidelity, usefulness, faithfulness, privacy; "-" where any answer is right
    "slices of other subjects": ("yes", "yes", "yes", "yes"),
    "training slices": ("-", "-", "-", "no"),
    "training slices of the earlier cohort, which is given": ("-", "-", "-", "no"),
    "training slices of the earlier cohort, not given": ("-", "-", "-", "inconclusive"),
    "18 % noise": ("no", "-", "-", "-"),
    "18 % partly inverted": ("no", "-", "-", "-"),
    "blurred, 1.5 pixels": ("no", "-", "-", "-"),
    "15 % brighter": ("no", "-", "-", "-"),
    "one image repeated": ("no", "-", "-", "-"),
    "20 images repeated and 8 % outliers": ("no", "-", "-", "-"),
    "SD within the classes × 0.65": ("no", "-", "-", "-"),
    "classes swapped": ("-", "no", "no", "-"),
    "class ignored": ("-", "no", "no", "-"),
    "disease effect × 2": ("-", "-", "no", "-"),
    "disease effect × 0.4": ("-", "-", "no", "-"),
    "10 % copies": ("-", "-", "-", "no"),
    "3 % copies": ("-", "-", "-", "no"),
    "10 % copies, rotated by 5 degrees": ("-", "-", "-", "no"),
    "2 samples": ("inconclusive",) * 4,
    "5 held-out subjects": ("inconclusive",) * 4,
}
PARAMETERS = ("ventricle", "atrophy", "hippocampus", "gamma")  # what makes the spread between subjects


def render(count: int, seed: int, change: Callable[[phantom.Subject], phantom.Subject]) -> np.ndarray:
    """(count, H, W) uint8: one slice of each fresh subject, AD and NC in turn; `change` alters the
    subject."""
    atlas = load_atlas()
    centre = phantom.CENTRE_MM[phantom.NORMAL_AXIS["sagittal"]]
    positions = phantom.slice_positions(SLICES) + centre
    slices = []
    for index in tqdm(range(count), desc="rendering", leave=False):
        subject = change(phantom.sample_subject(seed, index))
        rng = np.random.default_rng([seed, index])
        place = float(positions[rng.integers(SLICES)]) + subject.x_offset
        field = phantom.disease_field(subject, atlas)
        slices.append(phantom.render_slice(subject, field, place, SIZE, rng, atlas)[0])
    return np.stack(slices)


def stronger(factor: float) -> Callable[[phantom.Subject], phantom.Subject]:
    """The mean displacement of the ventricles' walls of AD moved to `factor` times its distance from NC's."""
    means = [phantom.SEVERITY[name]["ventricle"][0] for name in CLASSES]

    def change(subject: phantom.Subject) -> phantom.Subject:
        by = (factor - 1) * (means[0] - means[1]) if subject.label == CLASSES[0] else 0.0
        return replace(subject, ventricle=subject.ventricle + by)

    return change


def alike(factor: float) -> Callable[[phantom.Subject], phantom.Subject]:
    """Every parameter of a subject moved toward the mean of its class."""

    def change(subject: phantom.Subject) -> phantom.Subject:
        means = {name: phantom.SEVERITY[subject.label][name][0] for name in PARAMETERS[:3]} | {"gamma": 1.0}
        moved = {name: mean + factor * (getattr(subject, name) - mean) for name, mean in means.items()}
        matrix = np.eye(3) + factor * (subject.to_template - np.eye(3))
        waves = (*subject.waves[:2], factor * subject.waves[2])
        bias = (*subject.bias[:2], factor * subject.bias[2])
        return replace(
            subject, **moved, to_template=matrix.astype(np.float32), waves=waves, bias=bias, x_offset=0.0
        )

    return change


def read_train(cohort: Path) -> tuple[np.ndarray, np.ndarray]:
    """Slices (N, H, W) of the training split, and their classes as indices."""
    table = pd.read_csv(cohort / "train/metadata.csv")
    slices = np.stack([np.asarray(Image.open(cohort / "train" / name)) for name in table.file_name])
    return slices, table.label.map(CLASSES.index).to_numpy()


class Battery:
    """The cohorts and the pipelines in `work`, made where they are missing, and the sets of samples."""

    def __init__(self, work: Path, count: int, classifier_steps: int):
        self.work, self.count, self.classifier_steps = work, count, classifier_steps
        self.cohort = self.make_cohort("cohort", train_seed=0, test_seed=1)
        self.earlier = self.make_cohort("earlier", train_seed=2, test_seed=3)
        self.vae = self.train("vae", self.cohort)
        self.model = self.train("ldm", self.cohort, vae=self.vae)
        self.model_after = self.train("ldm", self.cohort, vae=self.train("vae", self.earlier))
        cached = work / "fresh.npy"
        if not cached.is_file():
            np.save(cached, render(2 * count, 10, lambda subject: subject))
        self.fresh, self.labels = np.load(cached), np.arange(2 * count) % 2
        self.train_slices, self.train_labels = read_train(self.cohort)
        self.rng = np.random.default_rng(0)

    def make_cohort(self, name: str, train_seed: int, test_seed: int) -> Path:
        """Train of one phantom cohort and test of another, 200 subjects each."""
        folder = self.work / name
        if folder.is_dir():
            return folder
        for split, seed in (("train", train_seed), ("test", test_seed)):
            whole = self.work / f"cohort_{seed}"
            if not whole.is_dir():
                phantom.write_phantom_cohort(
                    whole, subjects=SUBJECTS, slices=SLICES, image_size=SIZE, seed=seed
                )
            tables = []
            for part in sorted(whole.glob("*/metadata.csv")):
                tables.append(pd.read_csv(part))
                for label in CLASSES:
                    (folder / split / label).mkdir(parents=True, exist_ok=True)
                    for path in (part.parent / label).glob("*.png"):
                        shutil.copy(path, folder / split / label)
            pd.concat(tables).to_csv(folder / split / "metadata.csv", index=False)
        return folder

    def train(self, recipe: str, data: Path, vae: Path | None = None) -> Path:
        """A run of a recipe of twenty steps."""
        folder = self.work / f"{recipe}_{(vae or data).name}"
        if not (folder / ("model_index.json" if recipe == "ldm" else "config.json")).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            recipe_of = ROOT / f"train_{recipe}.py"
            command = [sys.executable, recipe_of, "--config", ROOT / f"configs/demo/{recipe}.yaml"]
            command += ["--data_dir", data, "--output_dir", folder, "--max_steps", 20]
            command += ["--vae", vae] if vae else []
            subprocess.run([str(word) for word in command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return folder

    def samples(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The slices and classes of a row."""
        images, labels, rng = self.fresh.copy(), self.labels.copy(), self.rng
        count = len(images)

        def some(share: float) -> np.ndarray:
            return rng.permutation(count)[: round(share * count)]

        def copy_train(rows: np.ndarray) -> None:
            for row in rows:
                images[row] = rng.choice(self.train_slices[self.train_labels == labels[row]])

        if name in ("slices of other subjects", "5 held-out subjects"):
            pass
        elif name == "training slices":
            copy_train(np.arange(count))
        elif name.startswith("training slices of the earlier cohort"):
            slices, classes = read_train(self.earlier)
            for row in range(count):
                images[row] = rng.choice(slices[classes == labels[row]])
        elif name == "18 % noise":
            rows = some(0.18)
            images[rows] = rng.integers(0, 256, images[rows].shape)
        elif name == "18 % partly inverted":
            rows = some(0.18)
            images[rows, :, SIZE // 2 :] = 255 - images[rows, :, SIZE // 2 :]
        elif name == "blurred, 1.5 pixels":
            images = ndimage.gaussian_filter(images.astype(float), (0, 1.5, 1.5)).round().astype(np.uint8)
        elif name == "15 % brighter":
            images = np.clip(1.15 * images.astype(float), 0, 255).round().astype(np.uint8)
        elif name == "one image repeated":
            images[:] = images[0]
        elif name == "20 images repeated and 8 % outliers":
            images = images[2 * rng.integers(10, size=count) + labels]
            rows = some(0.08)
            images[rows] = rng.integers(0, 256, images[rows].shape)
        elif name == "SD within the classes × 0.65":
            images = render(count, 10, alike(0.65))
        elif name == "classes swapped":
            labels = 1 - labels
        elif name == "class ignored":
            labels = rng.permutation(labels)
        elif name.startswith("disease effect"):
            images = render(count, 10, stronger(float(name.split()[-1])))
        elif name == "2 samples":
            images, labels = images[:2], labels[:2]
        elif "copies" in name:
            rows = some(float(name.split()[0]) / 100)
            copy_train(rows)
            if "rotated" in name:
                for row in rows:
                    turned = Image.fromarray(images[row]).rotate(rng.choice([-5, 5]), Image.BICUBIC)
                    images[row] = np.asarray(turned)
        else:
            raise ValueError(name)
        return images, labels

    def verdicts(self, name: str) -> dict[str, dict]:
        """Write the samples of a row, run evaluate.py on them, and read its verdicts."""
        folder, report = self.work / "samples", self.work / "report"
        for old in (folder, report):
            shutil.rmtree(old, ignore_errors=True)
        for index, (image, label) in enumerate(zip(*self.samples(name), strict=True)):
            path = folder / CLASSES[label] / f"{index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        earlier = "earlier" in name
        words = ["--real", self.few_subjects() if name == "5 held-out subjects" else self.cohort]
        words += ["--samples", folder, "--output_dir", report]
        words += ["--model", self.model_after if earlier else self.model]
        words += ["--also_trained_on", self.earlier] if name.endswith("which is given") else []
        words += ["--classifier_steps", self.classifier_steps, "--curve_images", 0]
        sys.argv = ["evaluate.py", *(str(word) for word in words)]
        evaluate.main()
        return json.loads((report / "metrics.json").read_text())["verdicts"]

    def few_subjects(self) -> Path:
        """The cohort with five of its held-out subjects."""
        folder = self.work / "few"
        if not folder.is_dir():
            shutil.copytree(self.cohort / "train", folder / "train")
            table = pd.read_csv(self.cohort / "test/metadata.csv")
            table = table[table.subject.isin(sorted(table.subject.unique())[:5])]
            for name in table.file_name:
                (folder / "test" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.cohort / "test" / name, folder / "test" / name)
            table.to_csv(folder / "test/metadata.csv", index=False)
        return folder


def remember_common_work() -> None:
    """Compute once what is the same in every row, by the contents of the images; draw no figures."""
    kept: dict[tuple, object] = {}

    def once(function: Callable, key: Callable[..., tuple]) -> Callable:
        def remembered(*arguments, **options):
            name = (function.__name__, *key(*arguments, **options))
            if name not in kept:
                kept[name] = function(*arguments, **options)
            return kept[name]

        return remembered

    def content(tensor) -> int:
        return hash(tensor.numpy().tobytes())

    train = once(
        classifier.train_classifier,
        lambda images, steps, **_: (content(images.images), images.labels.tobytes(), steps),
    )
    evaluate.train_classifier = tstr.train_classifier = train
    privacy.nearest_in_pixels = once(
        nearest_neighbors.nearest_in_pixels, lambda images, others, _: (content(images), content(others))
    )
    evaluate.measure_anatomy = once(anatomy.measure_anatomy, lambda images, *_, **__: (content(images),))
    privacy.denoising_losses = once(
        model_outputs.denoising_losses,
        lambda model, images, **_: (hash_pipeline(model), content(images.images)),
    )
    evaluate.reconstruct = once(
        model_outputs.reconstruct, lambda vae, images: (hash_weights(vae), content(images.images))
    )
    for name in ("plot_comparisons", "plot_model", "write_html"):
        setattr(evaluate, name, lambda *_: None)
    for name in ("save_anatomy", "save_spectrum", "save_umap"):
        setattr(evaluate.figures, name, lambda *_, **__: None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for cohorts, models and samples")
    parser.add_argument("--count", type=int, default=500, help="samples of each class")
    parser.add_argument("--classifier_steps", type=int, default=60, help="of evaluate.py")
    parser.add_argument("--rows", nargs="+", help="names of rows; all if none is given")
    parser.add_argument("--output", type=Path, help="write the table here too")
    options = parser.parse_args()
    remember_common_work()
    battery = Battery(options.work, options.count, options.classifier_steps)
    lines = [
        "# Verdicts on planted faults",
        "",
        f"evaluate.py on the phantom: {SUBJECTS // 2} held-out subjects a class of {SLICES} slices at {SIZE} "
        f"pixels, {options.count} samples a class, {options.classifier_steps} classifier steps, seed 0. In "
        "brackets: what the answer should be, where it is another.",
        "",
        f"| samples | {' | '.join(QUESTIONS)} |",
        "| --- " * (1 + len(QUESTIONS)) + "|",
    ]
    print("\n".join(lines[-2:]), flush=True)
    for name in options.rows or EXPECTED:
        found = battery.verdicts(name)
        cells = []
        for question, expected in zip(QUESTIONS, EXPECTED[name], strict=True):
            answer = ANSWERS[found[question]["good"]]
            cells.append(answer if expected in ("-", answer) else f"**{answer}** ({expected})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
