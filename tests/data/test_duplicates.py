"""Duplicates under two names are found in any format, after JPEG and gain; other subjects are not."""

from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

from adni_ldm.data.duplicates import NEAR, difference_hash, near_pairs
from adni_ldm.data.qc import check_folder
from adni_ldm.data.qc_figures import save_qc_figures


def test_one_picture_in_two_splits_is_a_problem_in_any_format(ad_nc_folder):
    folder = ad_nc_folder(suffix=".png")
    Image.open(folder / "train/AD/1001_78.png").convert("RGB").save(folder / "test/AD/3009_12.bmp")
    report = check_folder(folder)
    (problem,) = report.problems
    assert "test/AD/3009_12.bmp and train/AD/1001_78.png: the same image twice" in problem
    assert not any("3009" in pair.first.path + pair.second.path for pair in report.near), "reported once"


def test_slices_of_one_subject_may_be_alike(ad_nc_folder):
    folder = ad_nc_folder(suffix=".png")
    Image.open(folder / "train/AD/1001_78.png").save(folder / "train/AD/1001_80.png")
    assert check_folder(folder).ok


@pytest.mark.parametrize("change", ["jpeg", "gain", "noise"])
def test_nearly_the_same_picture_of_two_subjects_is_mentioned_once_and_drawn(phantom_dir, tmp_path, change):
    folder = tmp_path / "cohort"
    for split in ("train", "test"):
        for cls in ("AD", "NC"):
            (folder / split / cls).mkdir(parents=True)
            for path in (phantom_dir / split / cls).glob("*.png"):
                Image.open(path).resize((256, 256)).save(folder / split / cls / path.name)
    assert not check_folder(folder).near, "brains of different subjects"
    originals = sorted((folder / "train/AD").glob("*.png"))[:3]  # one subject's
    for number, path in enumerate(originals):
        Image.fromarray(altered(np.asarray(Image.open(path)), change)).save(
            folder / f"test/AD/twin_{number}.png"
        )
    report = check_folder(folder)
    assert report.ok, "a hash can err: a note, no problem"
    (note,) = [note for note in report.notes if "near-duplicates" in note]
    assert "test/AD/twin_0.png" in note and originals[0].name in note and "2 more of these two" in note
    drawn = save_qc_figures(report, tmp_path / "figures")
    assert [path.name for path in drawn] == ["contact_sheet.png", "histograms.png", "near_duplicates.png"]
    assert all(Image.open(path).size[0] > 200 for path in drawn)


def altered(pixels: np.ndarray, change: str) -> np.ndarray:
    if change == "gain":
        return (pixels * 0.8).astype(np.uint8)
    if change == "noise":
        noise = np.random.default_rng(0).normal(0, 4, pixels.shape)
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def test_near_pairs_are_those_that_all_pairs_would_give():
    """Across the blocks that they are compared in, and only up to the threshold."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (1500, 576), dtype=np.uint8)
    for twin, original, flips in ((1400, 3, 0), (700, 650, NEAR), (701, 20, NEAR + 1), (1499, 0, 7)):
        bits[twin] = bits[original]
        bits[twin, rng.permutation(576)[:flips]] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64)
    assert {tuple(pair) for pair in near_pairs(hashes).tolist()} == {(3, 1400), (650, 700), (0, 1499)}


def test_every_pair_of_ten_thousand_pictures_in_seconds():
    hashes = np.random.default_rng(0).integers(0, 2**63, (10_000, 9), dtype=np.uint64)
    start = time.process_time()
    assert not len(near_pairs(hashes))
    assert time.process_time() - start < 5, "30,520 images are nine times as many pairs"


def test_a_hash_does_not_depend_on_noise_in_the_background():
    noise = np.random.default_rng(0).integers(0, 3, (256, 240), dtype=np.uint8)
    assert not difference_hash(Image.fromarray(noise)).any()
