"""The classifier separates the classes, is determined by its seed, and is trained on balanced batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from discs import discs

from adni_ldm.errors import UserError
from adni_ldm.evaluation.classifier import augment, build_classifier, probabilities, train_classifier


def test_it_separates_the_classes_of_unseen_subjects():
    unseen = discs(30, seed=1)
    chances = probabilities(train_classifier(discs(40, seed=0), steps=30, batch_size=32), unseen)
    assert chances.shape == (60, 2) and np.allclose(chances.sum(1), 1, atol=1e-5)
    assert (chances.argmax(1) == unseen.labels).mean() > 0.9


def test_the_seed_determines_the_weights_and_leaves_the_global_random_state():
    train = discs(8)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_classifier(train, seed=0, steps=2, batch_size=8)
    assert torch.equal(torch.rand(3), expected)
    again, other = (train_classifier(train, seed=seed, steps=2, batch_size=8) for seed in (0, 1))
    pairs = [(first.state_dict()[key], again.state_dict()[key]) for key in first.state_dict()]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert not first.training


def test_batches_are_class_balanced():
    """Uninformative labels, nine to one: the probability of the rare class is a half, not a tenth."""
    train = discs(50, holes=(0.15, 0.15))
    train = replace(train, labels=(np.arange(100) % 10 > 0).astype(int))
    chances = probabilities(
        train_classifier(train, steps=40, batch_size=32), discs(50, 1, 1, holes=(0.15, 0.15))
    )
    assert 0.3 < chances[:, 0].mean() < 0.7


def test_augmentation_shifts_and_scales_within_its_limits():
    images = torch.full((200, 1, 32, 32), -1.0)
    images[:, 0, 4:8, 4:8] = 0.8
    moved = augment(images, torch.Generator().manual_seed(0))
    rows, columns = (torch.where(moved[:, 0] > 0)[axis] for axis in (1, 2))
    assert moved.min() == -1 and moved.max() <= 1
    for places in (rows, columns):
        assert places.min() == 2 and places.max() == 9, "up to 2 of 32 pixels, either way"
    brightness = moved.amax((1, 2, 3))
    assert 0.6 < brightness.min() < 0.66 and 0.94 < brightness.max() < 1


@pytest.mark.parametrize(("size", "width"), [(16, 256), (64, 256), (128, 512)])
def test_every_size_of_slice_gives_one_logit_a_class(size, width):
    model = build_classifier(3, size).eval()
    assert model.fc.in_features == width
    assert model(torch.zeros(1, 1, size, size)).shape == (1, 3)


def test_a_single_class_is_rejected():
    with pytest.raises(UserError, match="classes present: NC; a classifier needs at least two"):
        train_classifier(discs(4).of_class("NC"))
