"""A subject withdraws: every place of its images is listed, and its caches are deleted."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import prepare_data
from adni_ldm.data import archives
from adni_ldm.data.manifest import write_manifest
from adni_ldm.data.provenance import describe_data, training_records
from adni_ldm.data.slices import load_slices, open_folder, read_slices, to_arrays
from adni_ldm.errors import UserError
from adni_ldm.models.autoencoder import build_autoencoder


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache/datasets")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))


def forget(capsys, *words) -> str:
    prepare_data.forget([str(word) for word in words])
    return capsys.readouterr().out


def save_vae(folder, records) -> None:
    vae = build_autoencoder(32, 4, [16, 32], 1, False)
    vae.register_to_config(_trained_on=records)
    vae.save_pretrained(folder)


def test_every_place_of_a_withdrawn_subject_is_listed_and_its_caches_are_deleted(
    ad_nc_folder, tmp_path, capsys
):
    folder = ad_nc_folder()
    write_manifest(folder, {})
    persons = {"1001": "a", "1002": "a"} | {str(n): f"p{n}" for n in (1003, 1004, 2001, 2002, 2003, 2004)}
    persons |= {str(n): f"p{n}" for n in (3001, 3002, 4001, 4002)}
    table = tmp_path / "study.csv"
    table.write_text("\n".join(["Image Data ID,Subject", *(f"I{i},{p}" for i, p in persons.items())]))
    listing = open_folder(folder, table=table)
    data = describe_data(listing, read_slices(listing, 1e-9))
    save_vae(tmp_path / "runs/one/vae", training_records(data))
    others = {"train": {name: scans for name, scans in data.subjects["train"].items() if name != "a"}}
    save_vae(tmp_path / "runs/two/vae", training_records(type(data)("1" * 64, "", ("AD",), True, others)))
    to_arrays(load_slices(folder, table=table)["train"], 32)
    packed = shutil.make_archive(str(tmp_path / "set"), "zip", folder)
    unpacked = archives.open_data_dir(packed)
    latents = tmp_path / "cache/adni_ldm/latents/abc"
    latents.mkdir(parents=True)
    (latents / "latents.json").write_text("{}")
    np.save(latents / "posteriors.npy", np.zeros(3))

    words = ("a", "--data_dir", folder, "--runs", tmp_path / "runs", "--table", table)
    text = forget(capsys, *words)
    lines = [line.split(": ")[0].split() for line in text.splitlines()]
    found = {
        kind: {place for first, place, *_ in lines if first == kind} for kind in ("data", "cache", "model")
    }
    images = {str(folder / f"train/AD/{scan}_{k}.jpeg") for scan in (1001, 1002) for k in (78, 79)}
    assert found["data"] == images | {str(folder / "manifest.json")}
    assert found["model"] == {str(tmp_path / "runs/one/vae")}
    prepared = found["cache"] - {str(unpacked), str(latents)}
    assert prepared and all(str(archives.cache_dir("slices")) in place for place in prepared)
    assert "with --yes" in text and unpacked.is_dir() and latents.is_dir(), "nothing is deleted unasked"

    assert "caches, deleted" in forget(capsys, *words, "--yes")
    assert not any(Path(place).exists() for place in found["cache"])
    assert all(Path(place).exists() for place in found["data"] | found["model"])
    assert " 0 caches" in forget(capsys, *words)


def test_caches_of_other_subjects_are_kept(ad_nc_folder, tmp_path, capsys):
    names = {"train/AD": ["1001", "1002"], "train/NC": ["2001", "2002"]}
    to_arrays(load_slices(ad_nc_folder(names))["train"], 32)
    kept = sorted(archives.cache_dir("slices").rglob("*.arrow"))
    text = forget(capsys, "3001", "--data_dir", tmp_path / "AD_NC", "--yes")
    assert "0 files of the data" in text and "0 caches" in text and "models were not searched" in text
    assert kept and all(path.is_file() for path in kept)


def test_forget_needs_a_subject():
    with pytest.raises(UserError, match="give the subject"):
        prepare_data.forget([])
