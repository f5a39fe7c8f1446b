"""Three classes through every recipe by its command line, and the data records in the models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from adni_ldm.data.manifest import write_manifest
from tests.conftest import write_ad_nc

ROOT = Path(__file__).parents[1]
SMALL = (
    "--classes AD,MCI,NC --image_size 32 --max_steps 2 --batch_size 4 --mixed_precision no --report_to none"
)
UNET = "--unet_widths 32 64 --token_dim 16 --layers_per_block 1 --validation_steps 0"
SCANS = {
    "train/AD": 1001,
    "train/MCI": 2001,
    "train/NC": 3001,
    "test/AD": 4001,
    "test/MCI": 5001,
    "test/NC": 6001,
}


def run(command, *words, status=0):
    """Run a recipe as a user would; returns its output."""
    words = [*command.split(), *map(str, words)]
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Four subjects a class to train on, two to test on, named by scan, and a study table beside them."""
    folder = tmp_path_factory.mktemp("three") / "data"
    scans = {
        place: [str(first + k) for k in range(4 if place.startswith("train") else 2)]
        for place, first in SCANS.items()
    }
    write_ad_nc(folder, scans, slices=(1, 2))
    rows = [f"I{scan},patient-{scan}" for names in scans.values() for scan in names]
    (folder.parent / "study.csv").write_text("\n".join(["Image Data ID,Subject", *rows]))
    write_manifest(folder, {})
    return folder


@pytest.fixture(scope="module")
def vae_dir(data_dir, tmp_path_factory):
    folder, table = tmp_path_factory.mktemp("three_vae"), data_dir.parent / "study.csv"
    places = ("--data_dir", data_dir, "--table", table, "--output_dir", folder)
    output = run(f"train_vae.py {SMALL} --widths 16 32", *places)
    assert "cannot be known" not in output, "the study table has the subjects"
    return folder


def test_three_classes_are_trained_on_and_sampled(data_dir, vae_dir, tmp_path):
    ldm, table = tmp_path / "ldm", data_dir.parent / "study.csv"
    places = ("--data_dir", data_dir, "--table", table, "--vae", vae_dir, "--output_dir", ldm)
    run(f"train_ldm.py {SMALL} {UNET}", *places)
    assert json.loads((ldm / "class_embedding/config.json").read_text())["class_names"] == ["AD", "MCI", "NC"]
    command = "sample.py --class all --num_images 1 --num_inference_steps 1 --mixed_precision no"
    run(command, "--model", ldm, "--output_dir", tmp_path / "samples")
    samples = pd.read_csv(tmp_path / "samples/metadata.csv")
    assert sorted(samples.label) == ["AD", "MCI", "NC"]

    # The manifest's hash is in the VAE, in its copy within the pipeline, in the U-Net and with the samples.
    digest = json.loads((data_dir / "manifest.json").read_text())["hash"]
    for folder in (vae_dir, ldm / "vae", ldm / "unet"):
        text = (folder / "config.json").read_text()
        (record,) = json.loads(text)["_trained_on"]
        assert record["hash"] == digest and "patient" not in text and len(record["ids"].split()) >= 6
    assert set(samples.data_hash) == {digest}


def test_a_vae_that_saw_the_test_subjects_is_refused(data_dir, vae_dir, tmp_path):
    """Data leakage: training and test subjects of a class are exchanged after the VAE was trained."""
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    (moved / "manifest.json").unlink()
    for old, new in (("train/AD", "x"), ("test/AD", "train/AD"), ("x", "test/AD")):
        (moved / old).rename(moved / new)
    places = ("--data_dir", moved, "--vae", vae_dir, "--output_dir", tmp_path / "ldm")
    output = run(f"train_ldm.py {SMALL} {UNET}", *places, status=1)
    assert "cannot be known" in output, "no table this time"
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"train_ldm.py: error: {vae_dir}: was trained on") and "test subjects" in last
    assert any(f"{scan}" in last for scan in range(1001, 1005))
    assert not (tmp_path / "ldm").exists()
