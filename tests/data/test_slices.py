"""load_slices, prepare_image, to_arrays: what the recipes train on is what the folder contains."""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from adni_ldm.data.archives import cache_dir
from adni_ldm.data.slices import (
    DataError,
    SliceTensors,
    evenly_spaced,
    load_slices,
    open_folder,
    prepare_image,
    read_image,
    to_arrays,
    to_float,
)
from adni_ldm.data.splits import choose_val_subjects, shared_subjects, subject_fraction


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def rows(dataset) -> set[tuple[int, str, int]]:
    return set(zip(dataset["label"], dataset["subject"], dataset["slice"], strict=True))


def test_ad_nc_folder_gives_label_subject_and_slice(ad_nc_folder):
    """Labels follow the folder, AD 0, NC 1; subject and slice follow the name; the folder stays untouched."""
    folder = ad_nc_folder()
    before = contents(folder)
    slices = load_slices(folder)
    assert list(slices) == ["train", "val", "test"]
    assert slices["train"].features["label"].names == ["AD", "NC"]
    assert rows(slices["test"]) == {
        (label, f"{s}00{k}", n) for label, s in ((0, 3), (1, 4)) for k in (1, 2) for n in (78, 79)
    }
    assert rows(slices["train"]) | rows(slices["val"]) == {
        (label, f"{s}00{k}", n) for label, s in ((0, 1), (1, 2)) for k in (1, 2, 3, 4) for n in (78, 79)
    }
    assert slices["test"][0]["image"].size == (256, 240)
    assert contents(folder) == before


def test_every_row_has_the_picture_of_its_own_file(ad_nc_folder):
    """Images stay with their subjects when validation is split off, and in to_arrays."""
    folder = ad_nc_folder(suffix=".png")
    for split, dataset in load_slices(folder).items():
        for row in to_arrays(dataset, 256).with_format("numpy"):
            place = "test" if split == "test" else "train"
            path = folder / place / ("AD", "NC")[row["label"]] / f"{row['subject']}_{row['slice']}.png"
            np.testing.assert_array_equal(row["image"], prepare_image(Image.open(path), 256))


def test_parent_folder_cn_upper_case_and_litter(ad_nc_folder, tmp_path):
    """ADNI/AD_NC/train, CN for NC, .JPEG, names with brackets, and what a Mac leaves behind."""
    folder = ad_nc_folder(
        {"train/AD": ["1", "2"], "train/CN": ["3", "4"]}, name="[x] ADNI/AD_NC", suffix=".JPEG"
    )
    shutil.copytree(folder, tmp_path / "[x] ADNI/__MACOSX/AD_NC")
    (folder / "train/AD/._1_78.JPEG").write_bytes(b"resource fork")
    slices = load_slices(tmp_path / "[x] ADNI")
    assert sorted(slices) == ["train", "val"]
    assert {row[:2] for split in slices.values() for row in rows(split)} == {
        (0, "1"),
        (0, "2"),
        (1, "3"),
        (1, "4"),
    }


def test_metadata_goes_before_the_file_name(ad_nc_folder):
    """Two scans of a subject count as one subject; subject names keep leading zeros."""
    folder = ad_nc_folder({"train/AD": ["1", "2"], "train/NC": ["3", "4"]}, slices=(78,))
    person = {"AD/1_78.jpeg": "007", "AD/2_78.jpeg": "008", "NC/3_78.jpeg": "009"}
    with (folder / "train/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ("file_name", "label", "subject", "slice", "age"),
                *((f, f[:2], s, 5, 70) for f, s in person.items()),
            ]
        )
    slices = load_slices(folder)
    assert rows(slices["train"]) | rows(slices["val"]) == {
        (0, "007", 5),
        (0, "008", 5),
        (1, "009", 5),
        (1, "4", 78),
    }


def test_phantom_cohort_loads_with_its_own_splits(phantom_dir):
    slices = load_slices(phantom_dir)
    assert sum(map(len, slices.values())) == 12 * 3
    for split, dataset in slices.items():
        on_disk = {p.stem.rpartition("_")[0] for p in (phantom_dir / split).rglob("*.png")}
        assert set(dataset["subject"]) == on_disk


def test_val_has_whole_subjects_of_both_classes_and_stays_put(ad_nc_folder):
    """No subject is in train and val, and none changes its split when others are added."""
    few = {"train/AD": [str(n) for n in range(1, 13)], "train/NC": [str(n) for n in range(101, 113)]}
    more = {place: [*names, *(str(int(n) + 50) for n in names)] for place, names in few.items()}
    before = load_slices(ad_nc_folder(few, name="few", slices=(1, 2)), val_fraction=0.3)
    after = load_slices(ad_nc_folder(more, name="more", slices=(1, 2)), val_fraction=0.3)
    for slices in (before, after):
        assert not set(slices["train"]["subject"]) & set(slices["val"]["subject"])
        assert set(slices["train"]["label"]) == set(slices["val"]["label"]) == {0, 1}
    assert set(before["val"]["subject"]) <= set(after["val"]["subject"])
    assert set(before["train"]["subject"]) <= set(after["train"]["subject"])


def test_choosing_val_subjects():
    """The fraction is near the requested one; no split is empty by chance; the numbers never change."""
    names = [f"S{n}" for n in range(2000)]
    assert len(choose_val_subjects({0: names[:1000], 1: names[1000:]}, 0.1)) == pytest.approx(200, abs=40)
    for fraction in (1e-9, 1 - 1e-9):
        chosen = choose_val_subjects({0: ["a", "b"], 1: ["c", "d", "e"], 2: ["alone"]}, fraction)
        assert (
            chosen & {"a", "b"}
            and {"a", "b"} - chosen
            and chosen & {"c", "d", "e"}
            and {"c", "d", "e"} - chosen
        )
        assert "alone" not in chosen
    assert subject_fraction("218391") == pytest.approx(0.281932933)
    with pytest.raises(ValueError, match="val_fraction=1.5"):
        choose_val_subjects({0: ["a", "b"]}, 1.5)
    assert shared_subjects({"train": ["a", "b"], "val": ["c"], "test": ["b", "c"]}) == {
        ("train", "test"): ["b"],
        ("val", "test"): ["c"],
    }


def test_subject_on_both_sides_is_refused(ad_nc_folder):
    shared = [str(n) for n in range(100, 112)]
    folder = ad_nc_folder(
        {"train/AD": shared, "train/NC": ["1", "2"], "test/AD": shared, "test/NC": ["3"]}, slices=(1,)
    )
    with pytest.raises(DataError, match=r"train and test share 12 subjects \(100, .*109, \.\.\.\)") as e:
        load_slices(folder)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_links_in_a_folder_of_slices_are_followed(ad_nc_folder, tmp_path):
    """Data sets on clusters are often assembled from links."""
    folder = ad_nc_folder()
    path = sorted((folder / "train/AD").iterdir())[0]
    path.symlink_to(path.rename(tmp_path / "elsewhere.jpeg"))
    assert str(path) in [file.path for file in open_folder(folder).files]
    assert read_image(path).size[0] > 0


def test_zip_is_read_like_the_folder_and_a_replaced_zip_anew(ad_nc_folder, tmp_path):
    folder = ad_nc_folder({"train/AD": ["1", "2"], "train/NC": ["3", "4"]}, slices=(1,), name="ADNI/AD_NC")

    def subjects_of_zip() -> set[str]:
        packed = shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path, "ADNI")
        return {row[1] for split in load_slices(packed).values() for row in rows(split)}

    assert subjects_of_zip() == {"1", "2", "3", "4"}
    (folder / "train/AD/2_1.jpeg").rename(folder / "train/AD/5_1.jpeg")
    assert subjects_of_zip() == {"1", "3", "4", "5"}


def test_copies_of_slices_are_readable_by_their_owner_alone(ad_nc_folder):
    arrays = to_arrays(load_slices(ad_nc_folder())["train"], 32)
    (folder,) = {Path(file["filename"]).parent for file in arrays.cache_files}
    cache = cache_dir("slices")
    assert folder.is_relative_to(cache)
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["no zip", "cut short", "bad member"])
def test_broken_zip_is_one_line(tmp_path, damage):
    path = tmp_path / "ADNI.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("AD_NC/train/AD/1_1.jpeg", os.urandom(5000))
    whole = path.read_bytes()
    path.write_bytes(
        {
            "no zip": b"<html>",
            "cut short": whole[:3000],
            "bad member": whole[:500] + bytes(100) + whole[600:],
        }[damage]
    )
    with pytest.raises(DataError) as error:
        load_slices(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_padding_does_not_resample():
    pixels = np.random.default_rng(0).integers(0, 256, (240, 256), dtype=np.uint8)
    padded = prepare_image(Image.fromarray(pixels), 256)
    assert padded.shape == (256, 256) and padded.dtype == np.uint8
    np.testing.assert_array_equal(padded[8:248], pixels)
    assert not padded[:8].any() and not padded[248:].any()


def test_resizing_keeps_the_aspect_and_does_not_alias():
    """A disc in a 256 x 240 image is as wide as it is high at 64 px; fine stripes become grey."""
    y, x = np.mgrid[:240, :256]
    disc = prepare_image(Image.fromarray(np.uint8(255 * ((x - 128) ** 2 + (y - 120) ** 2 < 80**2))), 64) > 127
    assert abs(int(disc.any(0).sum()) - 40) <= 1 and abs(int(disc.any(1).sum()) - 40) <= 1
    stripes = prepare_image(Image.fromarray(np.tile(np.uint8([[0, 255]]), (256, 128))), 64)
    assert abs(stripes[8:-8, 8:-8].astype(int) - 127).max() < 12


def test_every_pixel_type_becomes_the_same_grey(tmp_path):
    """Grey, RGB, RGBA, palette, CMYK and 16-bit files of one image give one array."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    grey = Image.fromarray(ramp)
    versions = {mode: grey.convert(mode) for mode in ("RGB", "RGBA", "LA")} | {"P": grey.quantize(256)}
    versions |= {
        "16": Image.fromarray(ramp.astype(np.uint16) * 16),
        "32": Image.fromarray(ramp.astype(np.int32) - 99),
    }
    for name, image in versions.items():
        path = tmp_path / f"{name}.{'tif' if name == '32' else 'png'}"
        image.save(path)
        np.testing.assert_allclose(
            prepare_image(read_image(path), 256).astype(int), ramp, atol=1, err_msg=name
        )
    np.testing.assert_allclose(
        prepare_image(grey.convert("RGB").convert("CMYK"), 256).astype(int), ramp, atol=1
    )
    seen_through = grey.convert("RGBA")
    seen_through.putalpha(Image.fromarray(np.uint8(ramp.T > 127) * 255))
    assert not prepare_image(seen_through, 256)[:128].any()  # transparent parts are black
    assert not prepare_image(Image.fromarray(np.full((8, 8), 900, np.uint16)), 8).any()  # nothing to scale by


def test_arrays_are_made_once_and_anew_when_a_file_changes(ad_nc_folder, monkeypatch):
    folder = ad_nc_folder()
    first = to_arrays(load_slices(folder)["test"], 32)
    monkeypatch.setattr("adni_ldm.data.slices.prepare_image", lambda *_: pytest.fail("decoded a second time"))
    again = to_arrays(load_slices(folder)["test"], 32)
    assert again.cache_files == first.cache_files
    monkeypatch.undo()

    path = folder / "test/AD/3001_78.jpeg"
    Image.new("L", (256, 240), 200).save(path)
    os.utime(path, (2_000_000_000, 2_000_000_000))
    changed = to_arrays(load_slices(folder)["test"], 32).with_format("numpy")
    assert changed[0]["image"][16, 16] == 200 and first.with_format("numpy")[0]["image"][16, 16] != 200


def test_tensors_and_batches(ad_nc_folder):
    """Black is -1, white is 1, and a loader's batch is exactly those images, in the requested order."""
    folder = ad_nc_folder(slices=(78,))
    extremes = Image.new("L", (256, 256), 0)
    extremes.paste(255, (128, 0, 256, 256))
    extremes.save(folder / "test/AD/3001_78.jpeg", quality=100)
    tensors = SliceTensors(to_arrays(load_slices(folder)["test"], 32))
    assert tensors[0]["image"].dtype == torch.float32 and tensors[0]["image"].shape == (1, 32, 32)
    assert tensors[0]["image"].min() == -1 and tensors[0]["image"].max() == 1
    assert tensors.labels.tolist() == [0, 0, 1, 1]
    (batch,) = DataLoader(tensors, batch_size=4, sampler=[3, 0, 2, 1])
    assert batch["label"].tolist() == [1, 0, 1, 0] and batch["label"].dtype == torch.int64
    torch.testing.assert_close(batch["image"], torch.stack([tensors[i]["image"] for i in (3, 0, 2, 1)]))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_truncated_image_is_named_from_any_process(ad_nc_folder, num_proc):
    folder = ad_nc_folder()
    path = folder / "test/NC/4001_79.jpeg"
    path.write_bytes(path.read_bytes()[:-800])
    dataset = load_slices(folder)["test"]
    with pytest.raises(DataError) as error:
        to_arrays(dataset, 32, num_proc=num_proc)
    assert str(path) in str(error.value) and "truncated" in str(error.value) and "\n" not in str(error.value)


def test_grey_levels_and_floats_convert_both_ways():
    grey = torch.arange(256, dtype=torch.uint8)
    images = to_float(grey)
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1
    assert torch.equal(((images + 1) * 127.5).round().to(torch.uint8), grey)


def test_evenly_spaced():
    assert (
        evenly_spaced(10, 4) == [0, 3, 6, 9] and evenly_spaced(2, 4) == [0, 1] and evenly_spaced(0, 4) == []
    )
