"""evaluate.py by its command line, on good samples, bad ones, and too few of them."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import evaluate
from adni_ldm.errors import UserError
from adni_ldm.preprocessing.phantom import write_phantom_cohort

SECTIONS = ("fidelity", "tstr", "conditioning", "anatomy", "privacy")
VERDICTS = ("fidelity", "usefulness", "faithfulness", "privacy")


def run(monkeypatch, *words) -> dict:
    """Run the recipe and read what it wrote; any NaN in metrics.json fails."""
    words = [str(word) for word in words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    evaluate.main()
    folder = Path(words[words.index("--output_dir") + 1])

    def reject(constant):
        raise AssertionError(f"{constant} in metrics.json")

    return json.loads((folder / "metrics.json").read_text(), parse_constant=reject)


def leaves(tree):
    """Every estimate in sections of metrics.json."""
    for node in tree.values():
        if isinstance(node, dict):
            yield from [node] if "value" in node else leaves(node)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """60 subjects, 9 of them in test and in val, 3 slices each at 32 px."""
    folder = tmp_path_factory.mktemp("evaluate") / "real"
    write_phantom_cohort(folder, subjects=60, slices=3, image_size=32, seed=0, workers=1)
    return folder


def as_samples(cohort: Path, folder: Path, classes=("AD", "NC"), shown_as=None) -> Path:
    """The slices of a cohort as samples of a perfect model."""
    shown_as = shown_as or {}
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index, path in enumerate(sorted(cohort.glob(f"*/{shown_as.get(name, name)}/*.png"))):
            shutil.copy(path, folder / name / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Other subjects of the same distribution: 60 slices of each class."""
    folder = tmp_path_factory.mktemp("evaluate") / "others"
    write_phantom_cohort(folder, subjects=40, slices=3, image_size=32, seed=7, workers=1)
    return folder


@pytest.fixture(scope="module")
def perfect(others, tmp_path_factory):
    return as_samples(others, tmp_path_factory.mktemp("samples") / "perfect")


QUICK = ("--classifier_steps", 12)


@pytest.fixture(scope="module")
def report(real, perfect, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "perfect"
    with pytest.MonkeyPatch.context() as patch:
        return run(patch, "--real", real, "--samples", perfect, "--output_dir", folder, *QUICK), folder


def test_the_report_has_every_section_and_verdict(report):
    metrics, folder = report
    assert set(metrics["verdicts"]) == set(VERDICTS)
    figures = list(leaves({name: metrics[name] for name in SECTIONS}))
    assert len(figures) > 40
    assert all("value" in figure for figure in figures)
    known = [figure for figure in figures if figure["value"] is not None]
    assert all(figure["low"] <= figure["high"] for figure in known if "low" in figure)
    assert all(figure.get("note") for figure in figures if figure["value"] is None), (
        "a missing value without its reason"
    )
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and 'src="data:image/png' in page
    for verdict in metrics["verdicts"].values():
        assert verdict["text"].split(".")[0] in page.replace("&#39;", "'")
    assert all(Image.open(path).size[0] > 100 for path in (folder / "figures").glob("*.png"))


def test_real_slices_of_other_subjects_reach_the_reference(report):
    """Real slices of other subjects, given as samples: near the reference, and no copies."""
    metrics, _ = report
    whole = metrics["fidelity"]["all"]
    assert whole["precision"]["value"] > 0.7 * whole["precision"]["reference"]
    assert whole["recall"]["value"] > 0.7 * whole["recall"]["reference"]
    assert metrics["privacy"]["copies"]["value"] < 0.08
    ratio = metrics["anatomy"]["ventricle_ratio"]["effect_ratio"]
    assert ratio["low"] < 1 < ratio["high"]
    assert metrics["verdicts"]["privacy"]["good"]


def test_the_same_seed_gives_the_same_metrics(report, real, perfect, tmp_path, monkeypatch):
    metrics, _ = report
    again = run(monkeypatch, "--real", real, "--samples", perfect, "--output_dir", tmp_path / "again", *QUICK)
    assert again == metrics


def test_copies_and_an_ignored_label_are_detected(real, others, tmp_path, monkeypatch):
    """Samples of AD that show real NC slices, and thirty training slices among the samples of NC."""
    folder = as_samples(others, tmp_path / "samples", shown_as={"AD": "NC"})
    for index, path in enumerate(sorted((real / "train/NC").glob("*.png"))[:30]):
        shutil.copy(path, folder / "NC" / f"9{index:05d}.png")
    metrics = run(monkeypatch, "--real", real, "--samples", folder, "--output_dir", tmp_path / "out", *QUICK)
    copies = metrics["privacy"]["copies"]
    assert copies["value"] * (120 + 30) >= 30 and copies["low"] > copies["reference"]
    assert metrics["verdicts"]["privacy"]["good"] is False
    assert metrics["verdicts"]["faithfulness"]["good"] is False
    assert metrics["anatomy"]["ventricle_ratio"]["effect_ratio"]["value"] < 0.5


@pytest.mark.parametrize("kind", ["one class", "all alike", "few"])
def test_insufficient_samples_give_no_value_but_the_reason(kind, real, others, tmp_path, monkeypatch):
    """No traceback and no NaN: an estimate, or the reason why there is none."""
    folder = tmp_path / "samples"
    if kind == "one class":
        as_samples(others, folder, classes=("AD",))
    else:
        for name in ("AD", "NC"):
            (folder / name).mkdir(parents=True)
            pixels = np.asarray(Image.open(next((others / "train" / name).glob("*.png"))))
            for index in range(3 if kind == "few" else 30):
                black = kind == "all alike" and name == "NC"
                Image.fromarray(np.zeros_like(pixels) if black else pixels).save(
                    folder / name / f"{index:06d}.png"
                )
    metrics = run(monkeypatch, "--real", real, "--samples", folder, "--output_dir", tmp_path / "out", *QUICK)
    figures = list(leaves({name: metrics[name] for name in SECTIONS}))
    assert all(figure.get("note") for figure in figures if figure["value"] is None)
    assert not metrics["verdicts"]["fidelity"]["good"] and not metrics["verdicts"]["faithfulness"]["good"]


def test_a_single_subject_per_class_gives_no_value(others, perfect, tmp_path, monkeypatch):
    for split in ("train", "val", "test"):
        for name in ("AD", "NC"):
            subject = sorted((others / split / name).glob("*.png"))[0].name.rsplit("_", 1)[0]
            (tmp_path / "real" / split / name).mkdir(parents=True)
            for path in (others / split / name).glob(f"{subject}_*.png"):
                shutil.copy(path, tmp_path / "real" / split / name)
    words = ("--real", tmp_path / "real", "--samples", perfect, "--output_dir", tmp_path / "out", *QUICK)
    metrics = run(monkeypatch, *words)
    assert metrics["anatomy"]["ventricle_ratio"]["effect_real"]["value"] is None
    assert all(metrics["verdicts"][name]["good"] is None for name in ("fidelity", "usefulness"))


def test_invalid_inputs_are_rejected(real, perfect, others, tmp_path, monkeypatch):
    def rejected(match, **changed):
        words = {"real": real, "samples": perfect, "output_dir": tmp_path / "out"} | changed
        with pytest.raises(UserError, match=match):
            run(monkeypatch, *[word for key, value in words.items() for word in (f"--{key}", value)])

    rejected("no such folder", samples=tmp_path / "nothing")
    (tmp_path / "empty/AD").mkdir(parents=True)
    rejected("no samples found", samples=tmp_path / "empty")
    mixed = as_samples(others, tmp_path / "mixed")
    Image.new("L", (48, 48)).save(mixed / "AD/999999.png")
    rejected("48 x 48 pixels", samples=mixed)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").write_text("mine")
    rejected("not empty", output_dir=tmp_path / "taken")
    assert (tmp_path / "taken/thesis.txt").read_text() == "mine"


def test_training_subjects_among_the_held_out_are_rejected(real, perfect, tmp_path, monkeypatch):
    """The samples' metadata.csv names the model, whose config lists its training subjects."""
    from adni_ldm.data.provenance import describe_data, training_records
    from adni_ldm.data.slices import open_folder, read_slices

    listing = open_folder(real)
    splits = read_slices(listing)
    swapped = {"train": splits["test"], "test": splits["train"]}
    records = training_records(describe_data(listing, swapped))
    (tmp_path / "model/unet").mkdir(parents=True)
    (tmp_path / "model/unet/config.json").write_text(json.dumps({"_trained_on": records}))
    folder = shutil.copytree(perfect, tmp_path / "samples")
    names = [f"{path.parent.name}/{path.name}" for path in sorted(folder.glob("*/*.png"))]
    table = pd.DataFrame({"file_name": names}).assign(model=str(tmp_path / "model"), model_hash="0")
    table.to_csv(folder / "metadata.csv", index=False)
    # Without the check the missing features end the run, after one step of the classifier's training.
    options = ("--output_dir", tmp_path / "out", "--classifier_steps", 1, "--features", tmp_path / "none")
    with pytest.raises(UserError, match="was trained on 10 of the test subjects"):
        run(monkeypatch, "--real", real, "--samples", folder, *options)
