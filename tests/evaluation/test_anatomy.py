"""Anatomical measures: close to the phantom's true areas, robust to noise, zero without a brain."""

import numpy as np
import pytest
import torch
from PIL import Image

from adni_ldm.evaluation.anatomy import measure_anatomy, ventricle_area
from adni_ldm.preprocessing.phantom import write_phantom_cohort


def cohort(folder, image_size: int, subjects: int):
    table = write_phantom_cohort(folder, subjects, slices=8, image_size=image_size, seed=1, workers=1)
    slices = [np.asarray(Image.open(folder / row.split / row.file_name)) for row in table.itertuples()]
    return table, torch.tensor(np.stack(slices))[:, None] / 127.5 - 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return cohort(tmp_path_factory.mktemp("anatomy") / "small", image_size=64, subjects=20)


def brain_area(images, pixel_mm):
    return measure_anatomy(images, pixel_mm)["brain_mm2"]


def correlation(measured, truth) -> float:
    return float(np.corrcoef(measured, truth)[0, 1])


def test_brain_area_is_the_truth(small):
    table, images = small
    measured = brain_area(images, table.pixel_mm[0])
    assert measured.shape == (160,) and measured.dtype == np.float64
    assert correlation(measured, table.brain_mm2) > 0.99
    assert measured == pytest.approx(table.brain_mm2.to_numpy(), rel=0.02)


def test_ventricle_area_follows_the_truth(small):
    table, images = small
    measured = ventricle_area(images, table.pixel_mm[0])
    assert correlation(measured, table.ventricle_mm2) > 0.96
    assert measured.mean() == pytest.approx(table.ventricle_mm2.mean(), rel=0.1)


def test_finer_pixels_measure_the_same_mm2(tmp_path):
    table, images = cohort(tmp_path / "fine", image_size=128, subjects=6)
    pixel_mm = table.pixel_mm[0]
    assert correlation(ventricle_area(images, pixel_mm), table.ventricle_mm2) > 0.96
    assert brain_area(images, pixel_mm) == pytest.approx(table.brain_mm2.to_numpy(), rel=0.02)


def test_the_group_difference_is_measured_without_metadata(small):
    table, images = small
    measured = table.assign(measured=ventricle_area(images, table.pixel_mm[0]))
    means = measured.groupby("label")[["measured", "ventricle_mm2"]].mean()
    difference = means.loc["AD"] - means.loc["NC"]
    assert difference.ventricle_mm2 > 100
    assert difference.measured == pytest.approx(difference.ventricle_mm2, rel=0.2)


def test_noise_and_background_change_the_areas_little(small):
    """Samples are noisy and their background is not exactly black."""
    table, images = small
    noise = 0.06 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = (images + noise.abs() + noise).clamp(-1, 1)
    pixel_mm = table.pixel_mm[0]
    assert brain_area(noisy, pixel_mm) == pytest.approx(table.brain_mm2.to_numpy(), rel=0.03)
    assert correlation(ventricle_area(noisy, pixel_mm), table.ventricle_mm2) > 0.95


def test_arrays_and_tensors_give_the_same_areas(small):
    _, images = small
    expected = ventricle_area(images[:4], 3.25)
    assert (expected > 0).all()
    np.testing.assert_array_equal(ventricle_area(images[:4].numpy(), 3.25), expected)
    np.testing.assert_array_equal(measure_anatomy(images[:4], 3.25)["ventricle_mm2"], expected)


def test_areas_are_zero_without_a_brain():
    black = torch.full((1, 1, 64, 64), -1.0)
    assert brain_area(black, 3.25).tolist() == [0.0]
    assert ventricle_area(black, 3.25).tolist() == [0.0]
    rows, columns = np.indices((64, 64)) - 32
    disc = np.where(rows**2 + columns**2 < 22**2, 0.4, -1.0)[None, None]
    assert brain_area(disc, 3.25) == pytest.approx(np.pi * (22 * 3.25) ** 2, rel=0.02)
    assert ventricle_area(disc, 3.25).tolist() == [0.0], "a uniform brain has no ventricle"
    assert brain_area(torch.empty(0, 1, 64, 64), 3.25).shape == (0,)


@pytest.mark.parametrize(
    ("images", "pixel_mm", "message"),
    [
        (torch.zeros(2, 3, 8, 8), 1.0, r"shape \(2, 3, 8, 8\)"),
        (torch.zeros(8, 8), 1.0, r"shape \(8, 8\)"),
        (torch.full((1, 1, 8, 8), 255.0), 1.0, r"span 255 to 255"),
        (torch.full((1, 1, 8, 8), float("nan")), 1.0, "span nan"),
        (torch.zeros(1, 1, 8, 8), 0.0, "pixel_mm=0.0"),
    ],
)
def test_invalid_slices_are_rejected(images, pixel_mm, message):
    for measure in (measure_anatomy, ventricle_area):
        with pytest.raises(ValueError, match=message):
            measure(images, pixel_mm)


def test_blur_shortens_the_cortical_border(small):
    """A blurred sample loses its sulci first."""
    table, images = small
    sharp = measure_anatomy(images, table.pixel_mm[0])["border_mm"]
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert np.mean(measure_anatomy(blurred, table.pixel_mm[0])["border_mm"]) < 0.95 * sharp.mean()
    assert sharp.mean() > np.sqrt(4 * np.pi * table.brain_mm2.mean()), (
        "a circle of that area has a shorter border"
    )


def test_blobs_outside_the_brain_are_measured_by_their_area(small):
    table, images = small
    pixel_mm = table.pixel_mm[0]
    spotted = images[:20].clone()
    spotted[:, :, 2:5, 2:6] = 0.5
    clean, found = (measure_anatomy(part, pixel_mm)["blobs_mm2"] for part in (images[:20], spotted))
    assert found - clean == pytest.approx(np.full(20, 12 * pixel_mm**2))


def test_the_ratio_is_that_of_the_areas_and_nan_without_a_brain(small):
    table, images = small
    slices = torch.cat([images[:3], torch.full_like(images[:1], -1)])
    values = measure_anatomy(slices, table.pixel_mm[0])
    assert values["ventricle_ratio"][:3] == pytest.approx(
        values["ventricle_mm2"][:3] / values["brain_mm2"][:3]
    )
    assert np.isnan(values["ventricle_ratio"][3]) and values["brain_mm2"][3] == 0
