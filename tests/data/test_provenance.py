"""A model records its training subjects as hashes, and is refused where these subjects are held out."""

from __future__ import annotations

import json

import pytest
from diffusers import AutoencoderKL
from diffusers.utils import logging

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

    model = training_records(describe(first))
    assert "1001" in describe(first).subjects["train"]
    with pytest.raises(DataError, match="person 1001"):
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
