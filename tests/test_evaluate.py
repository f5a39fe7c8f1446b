"""evaluate.py by its command line, on good samples, bad ones, and too few of them."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stand_ins import make_pipeline

import evaluate
from adni_ldm.data.provenance import DataRecord, describe_data, training_records
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.loading import load_pipeline
from adni_ldm.preprocessing.phantom import write_phantom_cohort

SECTIONS = ("fidelity", "tstr", "conditioning", "anatomy", "spectrum", "privacy")
VERDICTS = ("fidelity", "usefulness", "faithfulness", "privacy")


def run(monkeypatch, *words, status=0) -> dict:
    """Run the recipe, which must exit with `status`, and read what it wrote; any NaN in metrics.json
    fails."""
    words = [str(word) for word in words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    assert evaluate.main() == status
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
    """100 subjects, 15 of them in test and in val, 3 slices each at 32 px."""
    folder = tmp_path_factory.mktemp("evaluate") / "real"
    write_phantom_cohort(folder, subjects=100, slices=3, image_size=32, seed=0, workers=1)
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
    assert {path.name for path in folder.iterdir()} == {"figures", "metrics.json", "report.html"}


def test_real_slices_of_other_subjects_reach_the_reference(report):
    """Real slices of other subjects, given as samples: near the reference, and no copies."""
    metrics, _ = report
    whole = metrics["fidelity"]["all"]
    assert whole["precision"]["value"] > 0.7 * whole["precision"]["reference"]
    assert whole["recall"]["value"] > 0.7 * whole["recall"]["reference"]
    assert metrics["privacy"]["copies"]["value"] < 0.08
    ratio = metrics["anatomy"]["ventricle_ratio"]["effect_ratio"]
    assert ratio["low"] < 1 < ratio["high"]
    assert all(one["good"] is not False for one in metrics["verdicts"].values())
    privacy = metrics["verdicts"]["privacy"]
    assert privacy["good"] is None and "give --model" in privacy["text"], "membership was not tested"


def test_require_exits_with_status_4_unless_the_verdict_is_favourable(
    real, perfect, tmp_path, monkeypatch, capsys
):
    """Without --require the status is 0, whatever the verdicts (`run` checks it)."""
    words = ["--real", real, "--samples", perfect, "--output_dir", tmp_path / "out", "--classifier_steps", 1]
    run(monkeypatch, *words, "--require", "privacy,fidelity", status=4)
    assert "not favourable on privacy" in capsys.readouterr().err
    with pytest.raises(UserError, match="beauty"):
        run(monkeypatch, *words, "--require", "beauty")


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


def generated_by(model: Path, samples: Path, name: str | None = None) -> Path:
    """Write the samples' metadata.csv as sample.py does, with the model under the path `name`."""
    names = [f"{path.parent.name}/{path.name}" for path in sorted(samples.glob("*/*.png"))]
    found = hash_pipeline(load_pipeline(str(model)))
    table = pd.DataFrame({"file_name": names}).assign(model=name or str(model), model_hash=found)
    table.to_csv(samples / "metadata.csv", index=False)
    return samples


def describe(folder: Path) -> DataRecord:
    listing = open_folder(folder)
    return describe_data(listing, read_slices(listing))


def save_model(folder: Path, unet: list[dict], vae: list[dict] | None = None) -> Path:
    """A pipeline with random weights and the given records of its training data."""
    pipeline = make_pipeline(32)
    pipeline.unet.register_to_config(_trained_on=unet)
    pipeline.vae.register_to_config(_trained_on=vae or [])
    pipeline.save_pretrained(folder)
    return folder


# Without the check under test the missing features end the run, after one step of the classifier's training.
SHORT = ("--classifier_steps", 1, "--features", "/nonexistent")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_training_subjects_among_the_held_out_are_rejected(part, real, perfect, tmp_path, monkeypatch):
    """The samples' metadata.csv names the model by a path that held in another working folder."""
    data = describe(real)
    swapped = {"train": data.subjects["test"], "test": data.subjects["train"]}
    leaking = training_records(dataclasses.replace(data, subjects=swapped))
    records = {"unet": training_records(describe(real)), "vae": []} | {part: leaking}
    model = save_model(tmp_path / "project/runs/ldm", **records)
    folder = generated_by(model, shutil.copytree(perfect, tmp_path / "project/out/samples"), "runs/ldm")
    with pytest.raises(UserError, match="was trained on 14 of the test subjects"):
        run(monkeypatch, "--real", real, "--samples", folder, "--output_dir", tmp_path / "out", *SHORT)


def test_a_model_of_the_hub_is_checked_too(real, perfect, tmp_path, monkeypatch):
    """What --model names is loaded, and the loaded parts' records are compared."""
    data = describe(real)
    swapped = {"train": data.subjects["test"], "test": data.subjects["train"]}
    model = save_model(tmp_path / "m", training_records(dataclasses.replace(data, subjects=swapped)))
    pipeline = load_pipeline(str(model))
    monkeypatch.setattr(evaluate, "load_pipeline", {"someone/model": pipeline}.__getitem__)
    words = ("--real", real, "--samples", perfect, "--output_dir", tmp_path / "out", *SHORT)
    with pytest.raises(UserError, match="someone/model: was trained on 14 of the test subjects"):
        run(monkeypatch, *words, "--model", "someone/model")


def test_copies_of_an_earlier_cohort_are_found_where_its_folder_is_given(real, others, tmp_path, monkeypatch):
    """A model was trained on `others`, then on `real`, and copies the former's training slices."""
    records = training_records(describe(real), training_records(describe(others)))
    model = save_model(tmp_path / "model", records, records[:1])
    folder = tmp_path / "samples"
    for name in ("AD", "NC"):
        shutil.copytree(others / "train" / name, folder / name)
    words = ("--real", real, "--samples", generated_by(model, folder), *QUICK, "--output_dir")

    metrics = run(monkeypatch, *words, tmp_path / "one")
    unseen = f"{records[0]['hash'][:12]} (vae, unet)"
    assert metrics["privacy"]["unseen_cohorts"] == [unseen]
    assert metrics["privacy"]["copies"]["value"] < 0.1
    assert unseen in (tmp_path / "one/report.html").read_text()

    metrics = run(monkeypatch, *words, tmp_path / "both", "--also_trained_on", others)
    assert metrics["privacy"]["unseen_cohorts"] == []
    assert metrics["privacy"]["copies"]["value"] > 0.9
    assert metrics["verdicts"]["privacy"]["good"] is False
    assert "unseen_cohorts" not in (tmp_path / "both/report.html").read_text()


def test_without_a_model_the_history_is_unknown(report):
    metrics, folder = report
    assert metrics["privacy"]["unseen_cohorts"] is None
    assert "unknown: the samples name no model" in (folder / "report.html").read_text()


def test_what_a_killed_report_left_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "report/figures").mkdir(parents=True)  # moved, when the kill came before metrics.json
    words = ["evaluate.py", "--samples", tmp_path / "none", "--output_dir", tmp_path / "report"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(UserError, match="report is not empty"):
            evaluate.main()
        (tmp_path / "report/.content.partial").mkdir()
        with pytest.raises(UserError, match="none"):  # the samples: it goes on
            evaluate.main()


def test_conditions_in_the_samples_metadata_are_compared_with_what_the_samples_show(
    real, others, perfect, tmp_path, monkeypatch
):
    """A perfect model that was asked for age and sex: sections, adjusted effects and matched copies."""
    samples = tmp_path / "samples"
    shutil.copytree(perfect, samples)
    known = pd.concat(
        pd.read_csv(path, dtype=str).assign(split=path.parent.name) for path in others.glob("*/metadata.csv")
    )
    rows = []
    for name in ("AD", "NC"):
        paths = sorted(others.glob(f"*/{name}/*.png"))
        by_path = {f"{row.split}/{row.file_name}": row for row in known.itertuples()}
        for index, path in enumerate(paths):
            row = by_path[str(path.relative_to(others))]
            rows.append({"file_name": f"{name}/{index:06d}.png", "label": name, "seed": index})
            rows[-1] |= {"age": row.age, "sex": row.sex}
    pd.DataFrame(rows).to_csv(samples / "metadata.csv", index=False)
    folder = tmp_path / "report"
    metrics = run(monkeypatch, "--real", real, "--samples", samples, "--output_dir", folder, *QUICK)
    assert set(metrics["conditions"]) == {"age", "sex", "effects"}
    assert "accuracy" in metrics["conditions"]["sex"] and "slope" in metrics["conditions"]["age"]
    ventricle = metrics["conditions"]["effects"]["ventricle_mm2"]
    assert 0.7 < ventricle["adjusted_ratio"]["value"] < 1.4
    assert metrics["privacy"]["matched_copies"]["value"] < 0.1
    assert set(metrics["tstr"]["matched"]) == {"real", "synthetic", "both"}
    page = (folder / "report.html").read_text()
    assert "at equal conditions, samples ÷ real" in page and "with the same conditions" in page
