"""The phantom cohort: same bytes from the same seed, a layout others read, a known group difference."""

import dataclasses
import hashlib
import json
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from adni_ldm.errors import UserError
from adni_ldm.preprocessing import phantom
from adni_ldm.preprocessing.phantom import write_phantom_cohort

TINY = {"subjects": 8, "slices": 2, "image_size": 32, "seed": 3, "workers": 1}


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantom") / "tiny"
    write_phantom_cohort(folder, **TINY)
    return folder


@pytest.fixture(scope="module")
def forty(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("phantom") / "forty"
    table = write_phantom_cohort(folder, subjects=40, slices=3, image_size=48, seed=0, workers=1)
    return folder, table


def test_same_seed_gives_same_bytes_with_more_workers(tiny, tmp_path):
    write_phantom_cohort(tmp_path / "again", **(TINY | {"workers": 2}))
    assert digests(tmp_path / "again") == digests(tiny)
    assert not list(tmp_path.glob(".*")), "the temporary folder stayed behind"


def test_other_seed_gives_other_pictures(tiny, tmp_path):
    write_phantom_cohort(tmp_path / "other", **(TINY | {"seed": 4}))
    first, second = (
        {path.name: path.read_bytes() for path in folder.rglob("*.png")}
        for folder in (tiny, tmp_path / "other")
    )
    assert len(first) == len(second) and not set(first.values()) & set(second.values())
    assert not first.keys() & second.keys(), "no subject name occurs in two cohorts"


def test_a_subject_is_the_same_in_a_larger_cohort(tiny, tmp_path):
    write_phantom_cohort(tmp_path / "larger", **(TINY | {"subjects": 10}))
    larger = {path.name: path.read_bytes() for path in (tmp_path / "larger").rglob("*.png")}
    for path in tiny.rglob("*.png"):
        assert larger[path.name] == path.read_bytes()


def test_pictures_are_brain_on_exact_black(forty):
    folder, table = forty
    for row in table.itertuples():
        with Image.open(folder / row.split / row.file_name) as image:
            assert image.mode == "L" and image.size == (48, 48)
            picture = np.asarray(image)
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert not edge.any(), f"{row.file_name}: the brain is cut, or air is not black"
        # What is not black is the brain of the truth, to a pixel's worth along the outline.
        shown = np.count_nonzero(picture) * row.pixel_mm**2
        assert shown == pytest.approx(row.brain_mm2, rel=0.03)
        assert picture[picture > 0].mean() > 60
    assert row.pixel_mm * 48 == phantom.FIELD_OF_VIEW_MM


def test_anterior_is_left_and_superior_is_up(forty):
    """Below the frontal lobe is air; cerebellum and brain stem lie low, and behind it."""
    folder, table = forty
    files = [folder / row.split / row.file_name for row in table.itertuples()]
    mean = np.mean([np.asarray(Image.open(file)) for file in files], axis=0)
    low = mean[32:37]  # 35 to 56 mm below the middle
    assert low[:, 24:].sum() > 3 * low[:, :24].sum()


def test_subjects_alternate_and_stay_within_a_split(forty):
    _, table = forty
    assert (table.groupby("subject").split.nunique() == 1).all()
    number = table.subject.str.split("p").str[1].astype(int)
    assert (table.label == np.where(number % 2 == 0, "AD", "NC")).all()
    counts = table.groupby(["label", "split"]).subject.nunique()
    for label in ("AD", "NC"):
        assert counts[label].to_dict() == {"train": 14, "val": 3, "test": 3}
    assert set(phantom.split_subjects(6, seed=0)) == {"train", "val", "test"}
    assert phantom.split_subjects(100, seed=0) != phantom.split_subjects(100, seed=1)


def test_imagefolder_reads_the_cohort(tiny):
    cohort = datasets.load_dataset("imagefolder", data_dir=str(tiny))
    assert set(cohort) == {"train", "validation", "test"}
    assert sum(len(split) for split in cohort.values()) == 16
    row = cohort["train"][0]
    assert row["image"].size == (32, 32) and row["image"].mode == "L"
    about = {"label", "subject", "slice", "slice_mm", "age", "sex"}
    assert set(row) == {"image", "pixel_mm", "ventricle_mm2", "brain_mm2"} | about
    assert row["label"] in ("AD", "NC") and row["sex"] in ("F", "M") and 55 <= row["age"] <= 92
    for split in ("train", "val", "test"):
        table = pd.read_csv(tiny / split / "metadata.csv")
        assert sorted(table.file_name) == sorted(
            str(path.relative_to(tiny / split)) for path in (tiny / split).rglob("*.png")
        )


def test_groups_differ_as_the_disease_and_overlap(forty):
    _, table = forty
    ventricle = table.groupby(["label", "subject"]).ventricle_mm2.mean()
    brain = table.groupby(["label", "subject"]).brain_mm2.mean()
    assert 1.7 < ventricle["AD"].mean() / ventricle["NC"].mean() < 3.0
    assert ventricle["AD"].min() < ventricle["NC"].max()
    assert brain["AD"].mean() < brain["NC"].mean() < 1.15 * brain["AD"].mean()
    assert brain["AD"].max() > brain["NC"].min()


def test_ventricle_truth_follows_the_push_and_shows_as_dark():
    """More push on the same head: a larger true area, and darker where it grew."""
    atlas = phantom.load_atlas()
    subject = phantom.sample_subject(seed=0, index=1)
    areas, darks = [], []
    for push in (0.0, 3.0, 6.0):
        pushed = dataclasses.replace(subject, ventricle=push)
        field = phantom.disease_field(pushed, atlas)
        picture, ventricle, _ = phantom.render_slice(pushed, field, 8.0, 64, np.random.default_rng(0), atlas)
        areas.append(ventricle)
        darks.append(np.count_nonzero((picture > 0) & (picture < 80)) * 3.25**2)
    assert areas[0] < areas[1] < areas[2]
    assert darks[2] - darks[0] == pytest.approx(areas[2] - areas[0], rel=0.4)


def test_without_covariate_effects_age_and_sex_leave_the_brain_as_it_is(tiny, tmp_path):
    """Another gap of ages changes the ages alone; the columns of the truth are those of before."""
    write_phantom_cohort(tmp_path / "older", **TINY, age_gap=10)
    before, after = (
        pd.concat(pd.read_csv(path) for path in sorted(folder.glob("*/metadata.csv")))
        for folder in (tiny, tmp_path / "older")
    )
    assert list(before) == list(after) and not [name for name in before if "mean_age" in name]
    assert before.drop(columns="age").equals(after.drop(columns="age"))
    moved = (after.age - before.age).groupby(before.label).mean()
    assert moved.AD > 2 and moved.NC < -2
    pictures = [
        sorted(path.read_bytes() for path in folder.rglob("*.png")) for folder in (tiny, tmp_path / "older")
    ]
    assert pictures[0] == pictures[1]
    settings = json.loads((tiny / "manifest.json").read_text())["settings"]
    assert "age_gap" not in settings, "the manifest of a cohort as before is as before"


def test_covariates_widen_the_ventricles_and_scale_the_brain_as_stated():
    atlas = phantom.load_atlas()
    plain, subject = (phantom.sample_subject(0, 2, covariate_effects=which) for which in (False, True))
    years = subject.age - phantom.NO_EFFECT_AGE
    for name, slope in phantom.PER_YEAR.items():
        assert getattr(subject, name) == pytest.approx(getattr(plain, name) + slope * years)
    scaled = plain.to_template / phantom.SEX_SCALE[subject.sex]
    assert np.allclose(subject.to_template, scaled)
    young, old = (phantom.measure_slice(phantom.aged(subject, more), 8.0, 64, atlas) for more in (-10, 10))
    assert young[0] < old[0] and young[1] > old[1], "wider ventricles, less brain"
    man, woman = (
        phantom.measure_slice(
            dataclasses.replace(plain, to_template=plain.to_template / phantom.SEX_SCALE[sex]), 8.0, 64, atlas
        )
        for sex in "MF"
    )
    assert man[1] / woman[1] == pytest.approx((1.025 / 0.975) ** 2, rel=0.03)


def test_the_truth_at_equal_age_and_without_the_disease(tmp_path):
    table = write_phantom_cohort(
        tmp_path / "c", **(TINY | {"subjects": 24}), covariate_effects=True, age_gap=8
    )
    patients, controls = (table[table.label == name] for name in ("AD", "NC"))
    assert (controls.ventricle_mm2_no_disease == controls.ventricle_mm2).all()
    assert (patients.ventricle_mm2_no_disease < patients.ventricle_mm2).mean() > 0.9
    assert (patients.brain_mm2_no_disease > patients.brain_mm2).mean() > 0.9
    older = table[table.age > phantom.MEAN_AGE + 3]
    assert (older.ventricle_mm2_mean_age < older.ventricle_mm2).mean() > 0.9
    as_it_is, equal = (
        patients[name].mean() - controls[name].mean() for name in ("ventricle_mm2", "ventricle_mm2_mean_age")
    )
    assert as_it_is > 1.1 * equal, "the older group has the larger ventricles for its age alone"
    again = phantom.sample_subject(3, 0, covariate_effects=True, age_gap=8)
    own = table[table.subject == "s3p0000"].iloc[0]
    areas = phantom.measure_slice(again, own.slice_mm, 32, phantom.load_atlas())
    assert areas[0] == pytest.approx(own.ventricle_mm2, rel=0.02, abs=20)


@pytest.mark.parametrize("gap", [-16, 15.5, float("nan")])
def test_a_gap_that_parts_the_groups_is_refused(tmp_path, gap):
    with pytest.raises(UserError, match="age_gap"):
        write_phantom_cohort(tmp_path / "c", **TINY, age_gap=gap)


def test_a_coronal_t2_cohort_is_symmetric_with_bright_fluid(tmp_path):
    pictures = {}
    for contrast in ("t1", "t2"):
        folder = tmp_path / contrast
        table = write_phantom_cohort(folder, **(TINY | {"plane": "coronal", "contrast": contrast}))
        files = [folder / row.split / row.file_name for row in table.itertuples()]
        pictures[contrast] = np.stack([np.asarray(Image.open(file), float) for file in files])
    assert table.slice_mm.between(-43, 9).all() and (table.ventricle_mm2 > 0).mean() > 0.8
    mean = pictures["t1"].mean(axis=0)
    assert np.corrcoef(mean.ravel(), mean[:, ::-1].ravel())[0, 1] > 0.97, "left and right of one brain"
    dark = (pictures["t1"] > 0) & (pictures["t1"] < 60)
    white = pictures["t1"] > 190
    assert pictures["t2"][dark].mean() > 120 > 60 > pictures["t2"][white].mean()
    assert np.array_equal(pictures["t1"] > 0, pictures["t2"] > 0)


def test_an_axial_cohort_is_symmetric_with_the_front_up(tmp_path):
    """As in `prepare_data.py scans`: the template's front is narrower than its back."""
    table = write_phantom_cohort(tmp_path, **(TINY | {"plane": "axial"}))
    files = [tmp_path / row.split / row.file_name for row in table.itertuples()]
    mean = np.stack([np.asarray(Image.open(file), float) for file in files]).mean(axis=0)
    assert np.corrcoef(mean.ravel(), mean[:, ::-1].ravel())[0, 1] > 0.97, "left and right of one brain"
    assert (table.ventricle_mm2 > 0).mean() > 0.8
    rows = np.flatnonzero((mean > 20).any(axis=1))
    widths = (mean[rows] > 20).sum(axis=1)
    assert widths[: len(rows) // 3].sum() < widths[-len(rows) // 3 :].sum()


@pytest.mark.parametrize(
    "bad",
    [{"subjects": 5}, {"slices": 0}, {"slices": 101}, {"image_size": 8}, {"seed": -1}, {"workers": 0}],
)
def test_bad_arguments_write_nothing(tmp_path, bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"{name}={value}: choose"):
        write_phantom_cohort(tmp_path / "cohort", **(TINY | bad))
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_phantom_cohort(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failed_run_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_phantom_cohort(tmp_path / "cohort", **TINY)
    assert not (tmp_path / "cohort").exists()
