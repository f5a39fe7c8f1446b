"""Faithfulness is the share that the judge recognizes, beside its share of real slices."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from discs import discs
from torch import nn

from adni_ldm.evaluation.conditioning import agreement, agreement_by_guidance


class ByBrightness(nn.Module):
    """Calls a bright slice NC: a judge whose verdicts are plain."""

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


HELD_OUT = plain([0, 0, 0, 1, 1], [0, 0, 0, 0, 1])  # three of four AD are told, the one NC is


def test_agreement_is_the_share_by_class_beside_that_of_real_slices():
    told = agreement(ByBrightness(), plain([0] * 9 + [1] + [0] * 2 + [1] * 3, [0] * 10 + [1] * 5), HELD_OUT)
    assert (told["AD"].value, told["AD"].floor) == (0.9, 0.75)
    assert (told["NC"].value, told["NC"].floor) == (0.6, 1.0)
    assert told["all"].value == pytest.approx(12 / 15)
    assert told["all"].floor == pytest.approx((10 * 0.75 + 5 * 1) / 15), (
        "classes as many as among the samples"
    )
    assert told["AD"].low < 0.9 < told["AD"].high < 1


def test_a_class_without_samples_or_real_slices_is_a_gap():
    told = agreement(ByBrightness(), plain([0, 0], [0, 0]), HELD_OUT)
    assert told["NC"].value is None and told["NC"].note == "no samples of NC"
    assert told["all"].value == 1 and told["all"].floor == 0.75
    told = agreement(ByBrightness(), plain([0, 1], [0, 1]), HELD_OUT.of_class("AD"))
    assert told["NC"].value == 1 and told["NC"].floor is None and told["all"].floor is None


def test_the_curve_asks_for_samples_at_each_scale():
    def draw(scale):  # the more guidance, the more are what they should be
        return plain([0] * int(scale) + [1] * (4 - int(scale)), [0] * 4)

    curve = agreement_by_guidance(ByBrightness(), draw, [1.0, 2.0, 4.0], HELD_OUT)
    assert {scale: estimate.value for scale, estimate in curve.items()} == {1.0: 0.25, 2.0: 0.5, 4.0: 1.0}
    assert curve[1.0].floor == 0.75
