"""A model records its training subjects as hashes, and is refused where these subjects are held out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from diffusers.utils import logging
from PIL import Image
from stand_ins import blob_image

from adni_ldm.data.provenance import (
    DataRecord,
    check_leakage,
    describe_data,
    model_records,
    records_by_part,
    training_records,
)
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.data.splits import DataError
from adni_ldm.models.autoencoder import build_autoencoder


def record(hash: str = "0" * 64, **subjects: list[str]) -> DataRecord:
    members = {split: {name: {name} for name in names} for split, names in subjects.items()}
    return DataRecord(hash, "names", ("AD", "NC"), True, members)


def test_a_training_subject_that_is_held_out_now_is_refused_by_name():
    model = training_records(record(train=["ann", "bob"], val=["cid"], test=["dan"]))
    check_leakage("runs/vae", model, record("1" * 64, train=["ann"], val=["cid"], test=["dan", "eve"]))
    with pytest.raises(DataError, match=r"runs/vae: .* 1 of the test subjects .*\(bob\)") as error:
        check_leakage("runs/vae", model, record("1" * 64, train=["ann"], val=["cid"], test=["bob", "dan"]))
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"of the val subjects .*\(ann\)"):
        check_leakage("runs/vae", model, record(train=["bob"], val=["ann"]))
    check_leakage("runs/vae", None, record(train=["bob"], val=["ann"]))  # a model that is not ours


def test_fine_tuning_does_not_forget_the_first_training():
    first = record(train=["ann"], test=["dan"])
    both = training_records(record("1" * 64, train=["bob"]), training_records(first))
    assert training_records(first, training_records(first)) == training_records(first), "the same data once"
    for name in ("ann", "bob"):
        with pytest.raises(DataError, match=name):
            check_leakage("runs/vae", both, record(train=["cid"], test=[name]))


def test_a_model_trained_without_the_table_is_caught_by_its_scans(ad_nc_folder, tmp_path):
    """It records the scan 1001; with the table, 1001 is a scan of a test subject."""
    first, second = ad_nc_folder(), {"train/AD": ["1002", "1003"], "train/NC": ["2001", "2002"]}
    second = ad_nc_folder(second | {"test/AD": ["1001"], "test/NC": ["4001"]}, name="second")
    rows = [f"I{n},person {n}" for n in (1001, 1002, 1003, 2001, 2002, 4001)]
    (tmp_path / "study.csv").write_text("\n".join(["Image Data ID,Subject", *rows]))

    def describe(folder, **options):
        scan = open_folder(folder, **options)
        return describe_data(scan, read_slices(scan, 1e-9))

    model = [record | {"slices": ""} for record in training_records(describe(first))]
    assert "1001" in describe(first).subjects["train"]
    with pytest.raises(DataError, match="person 1001.* by their names"):
        check_leakage("runs/vae", model, describe(second, table=tmp_path / "study.csv"))


def test_the_record_travels_with_the_config_in_silence_and_names_nobody(tmp_path, capfd):
    """Through from_pretrained and save_pretrained of diffusers, which warns of entries it does not know."""
    vae = build_autoencoder(32, 4, [16, 32], 1, False)
    vae.register_to_config(_trained_on=training_records(record(train=["002_S_0413"])))
    vae.save_pretrained(tmp_path / "one")
    logging.set_verbosity_info()
    AutoencoderKL.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    logging.set_verbosity_warning()
    assert "_trained_on" not in capfd.readouterr().err
    text = (tmp_path / "two/config.json").read_text()
    assert json.loads(text)["_trained_on"] == training_records(record(train=["002_S_0413"]))
    assert "0413" not in text


def test_the_history_of_a_model_is_that_of_all_its_parts(pipeline, tmp_path):
    """A VAE may be trained on other data than the U-Net; from a folder, and from what was loaded."""
    adni, phantom = (training_records(record(digit * 64, train=["ann"])) for digit in "12")
    pipeline.vae.register_to_config(_trained_on=adni + phantom)
    pipeline.unet.register_to_config(_trained_on=phantom)
    pipeline.save_pretrained(tmp_path)
    for model in (tmp_path, str(tmp_path), pipeline.components):
        assert model_records(model) == adni + phantom, "each record once"
        assert records_by_part(model) == {"vae": adni + phantom, "unet": phantom, "class_embedding": []}
    assert model_records(tmp_path / "vae") == adni + phantom, "of an autoencoder's own folder"
    assert records_by_part(tmp_path / "nothing") == {}


def images(folder: Path, first: int = 0, prefix: str = "", subjects: int = 9) -> Path:
    """A folder of subjects 001, 002 ... whose images depend on `first`; the last two are in test."""
    for number in range(1, subjects + 1):
        split = "test" if number > subjects - 2 else "train"
        place = folder / split / ("AD", "NC")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        for index in range(3):
            image = blob_image((first + number, index), 24, 24)
            image.save(place / f"{prefix}{number:03d}_{index}.png")
    return folder


def describe(folder: Path) -> DataRecord:
    listing = open_folder(folder)
    return describe_data(listing, read_slices(listing))


def test_two_studies_that_number_their_subjects_alike_are_distinguished_by_pixels(tmp_path):
    one, two = images(tmp_path / "one", subjects=9), images(tmp_path / "two", first=100, subjects=8)
    model = training_records(describe(one))
    check_leakage("runs/vae", model, describe(two))  # 007 is in train of one, in test of two
    for incomparable in ({"slices": ""}, {"prepared": "in another way"}):
        with pytest.raises(DataError, match=r"test subjects .*\(007\), by their names; .* prefix"):
            check_leakage("runs/vae", [model[0] | incomparable], describe(two))


def test_a_subject_that_got_another_name_is_found_by_pixels(tmp_path):
    one, two = images(tmp_path / "one", subjects=9), images(tmp_path / "two", prefix="x", subjects=8)
    with pytest.raises(DataError, match=r"1 of the test subjects .*\(x007\), by the pixels of their slices"):
        check_leakage("runs/vae", training_records(describe(one)), describe(two))


@pytest.mark.parametrize("name", ["002_S_0413", "I218391", "218391"])
def test_names_that_no_two_people_have_count_without_pixels(name):
    """The same scan prepared by other software has the same name and other pixels."""
    slices = [{"train": {name: {digit * 32}}, "test": {name: {digit * 32}}} for digit in "12"]
    first, second = record(train=[name]), record("1" * 64, train=["eve"], test=[name])
    first, second = (replace(one, slices=own, prepared="a") for one, own in zip((first, second), slices))
    with pytest.raises(DataError, match=f"{name}\\), by their names"):
        check_leakage("runs/vae", training_records(first), second)


def test_files_that_are_numbered_through_are_not_scans_of_one_subject(tmp_path):
    """img_0001.png, with the subjects in metadata.csv: the autoencoder just trained on them is accepted."""
    folder = images(tmp_path / "data")
    for split in ("train", "test"):
        rows = ["file_name,subject"]
        for index, path in enumerate(sorted((folder / split).rglob("*.png"))):
            subject = path.name[:3]
            path = path.rename(path.with_name(f"img_{index:04d}.png"))
            rows.append(f"{path.parent.name}/{path.name},{subject}")
        (folder / split / "metadata.csv").write_text("\n".join(rows))
    data = describe(folder)
    check_leakage("runs/vae", training_records(data), data)
    assert all(scans == {name} for names in data.subjects.values() for name, scans in names.items())


def test_slices_without_any_structure_do_not_tell_subjects_apart(tmp_path):
    for number in range(1, 9):
        place = tmp_path / ("test" if number > 6 else "train") / ("AD", "NC")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("L", (24, 24), 0).save(place / f"{number:03d}_0.png")
    data = describe(tmp_path)
    assert "slices" not in training_records(data)[0]
    check_leakage("runs/vae", training_records(data), data)
