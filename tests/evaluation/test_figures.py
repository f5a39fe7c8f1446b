"""Figures of the report work with missing data, and show no subject ID."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from adni_ldm.evaluation import figures
from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.evaluation.nearest_neighbors import nearest_in_pixels
from adni_ldm.evaluation.privacy import CopyRule, nearest_pairs


def random_set(count, seed=0, names=("AD", "NC")):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 1, 32, 32), dtype=np.uint8))
    subjects = np.array([f"subject-{row // 3}" for row in range(count)])
    return ImageSet(images, np.arange(count) % len(names), subjects, names)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


RULE = CopyRule(0.5, 0.01, 100, 10)


def plot_pairs(path, train, samples):
    near = nearest_in_pixels(samples.images, train.images, train.subjects)
    figures.save_pairs(path, nearest_pairs(near, samples, train, RULE), samples, train)
    return pixels(path)


def test_the_pairs_show_the_difference_and_no_subject_id(tmp_path):
    train, samples = random_set(30), random_set(12, seed=1)
    image = plot_pairs(tmp_path / "a.png", train, samples)
    renamed = dataclasses.replace(train, subjects=np.char.replace(train.subjects, "subject", "Jane Doe"))
    assert (plot_pairs(tmp_path / "b.png", renamed, samples) == image).all()

    copies = dataclasses.replace(samples, images=train.images[:12].roll((1, 2), (2, 3)))
    image = plot_pairs(tmp_path / "c.png", train, copies)
    red, blue = image[..., 0] - image[..., 2] > 60, image[..., 2] - image[..., 0] > 60
    bar = int(0.85 * image.shape[1])
    assert red[:, :bar].sum() < 0.01 * red[:, :bar].size, (
        "aligned copies have no difference; only their titles are red"
    )
    assert blue[:, :bar].sum() == 0


def test_the_class_difference_is_that_of_the_means(tmp_path):
    """In one square, AD is darker than NC in the real slices and brighter in the samples."""
    real, samples = random_set(40), random_set(40, seed=1)
    for images, ad, nc in ((real, 0, 128), (samples, 128, 0)):
        images.images[:] = 50
        for label, value in ((0, ad), (1, nc)):
            images.images[torch.from_numpy(images.labels == label), :, 12:20, 12:20] = value
    figures.save_class_difference(tmp_path / "a.png", real, samples)
    image = pixels(tmp_path / "a.png")
    middle = image.shape[0] // 2
    left, right = image[middle, int(0.21 * image.shape[1])], image[middle, int(0.65 * image.shape[1])]
    assert left[2] > left[0] + 50, f"blue where AD is darker, {left}"
    assert right[0] > right[2] + 50, f"red where AD is brighter, {right}"


def test_figures_work_with_missing_classes_and_samples(tmp_path):
    real, samples = random_set(9), random_set(6, seed=1)
    three = random_set(9, names=("AD", "MCI", "NC"))
    only_ad, none = samples.of_class("AD"), samples.take([])
    for index, some in enumerate((samples, only_ad, none)):
        figures.save_class_difference(tmp_path / f"difference{index}.png", real, some)
        figures.save_real_beside_samples(tmp_path / f"beside{index}.png", real, some)
        ratios = np.linspace(0, 1.2, len(some))
        figures.save_nearest_histogram(
            tmp_path / f"nearest{index}.png", ratios, ratios, RULE if index else None
        )
    figures.save_real_beside_samples(tmp_path / "three.png", three, three)
    figures.save_reconstructions(tmp_path / "reconstructions.png", real, real.floats())
    for path in tmp_path.iterdir():
        assert pixels(path).std() > 0, path


@pytest.mark.slow
def test_umap_is_deterministic_and_works_with_few_slices(tmp_path):
    rng = np.random.default_rng(0)
    real, samples = random_set(40), random_set(30, seed=1)
    features = [rng.normal(5 * images.labels[:, None], 1, (len(images), 8)) for images in (real, samples)]
    for name in ("a.png", "b.png"):
        figures.save_umap(tmp_path / name, "features", (features[0], real), (features[1], samples), most=35)
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()
    few = (features[0][:4], real.take(slice(4)))
    figures.save_umap(tmp_path / "few.png", "features", few, few)
