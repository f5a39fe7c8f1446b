"""Class-conditioning accuracy is the share of samples that the classifier recognizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from discs import discs
from torch import nn

from adni_ldm.evaluation.conditioning import (
    class_conditioning_accuracy,
    class_conditioning_accuracy_by_guidance,
)


class ByBrightness(nn.Module):
    """Classifies a bright slice as NC."""

    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.0))

    def forward(self, images):
        over = images.mean((1, 2, 3)) - self.threshold
        return torch.stack([-over, over], dim=1)


def plain(bright, labels):
    """Slices all white where `bright`, else black."""
    made = discs(len(labels), classes=("AD",))
    images = torch.tensor(bright).mul(255).byte()[:, None, None, None].expand(-1, 1, 8, 8)
    return replace(made, images=images, labels=np.array(labels), class_names=("AD", "NC"))


HELD_OUT = plain([0, 0, 0, 1, 1], [0, 0, 0, 0, 1])  # three of four AD and the one NC are recognized


def test_accuracy_by_class_with_that_of_real_slices():
    result = class_conditioning_accuracy(
        ByBrightness(), plain([0] * 9 + [1] + [0] * 2 + [1] * 3, [0] * 10 + [1] * 5), HELD_OUT
    )
    assert (result["AD"].value, result["AD"].reference) == (0.9, 0.75)
    assert (result["NC"].value, result["NC"].reference) == (0.6, 1.0)
    assert result["all"].value == pytest.approx(12 / 15)
    assert result["all"].reference == pytest.approx((10 * 0.75 + 5 * 1) / 15), (
        "with the class frequencies of the samples"
    )
    assert result["AD"].low < 0.9 < result["AD"].high < 1


def test_a_class_without_samples_or_real_slices_has_no_value():
    result = class_conditioning_accuracy(ByBrightness(), plain([0, 0], [0, 0]), HELD_OUT)
    assert result["NC"].value is None and result["NC"].note == "no samples of NC"
    assert result["all"].value == 1 and result["all"].reference == 0.75
    result = class_conditioning_accuracy(ByBrightness(), plain([0, 1], [0, 1]), HELD_OUT.of_class("AD"))
    assert result["NC"].value == 1 and result["NC"].reference is None and result["all"].reference is None


def test_the_curve_generates_samples_at_each_guidance_scale():
    def generate(scale):  # accuracy grows with the guidance scale
        return plain([0] * int(scale) + [1] * (4 - int(scale)), [0] * 4)

    curve = class_conditioning_accuracy_by_guidance(ByBrightness(), generate, [1.0, 2.0, 4.0], HELD_OUT)
    assert {scale: estimate.value for scale, estimate in curve.items()} == {1.0: 0.25, 2.0: 0.5, 4.0: 1.0}
    assert curve[1.0].reference == 0.75
