"""Learning-rate schedule and EMA."""

import math

import pytest
import torch

from adni_ldm.training.ema import HalfLifeEMA, ema_weights, update_ema
from adni_ldm.training.optimizer import learning_rate_at


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate_at(step, 1e-3, warmup_steps=10, max_steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[55] == pytest.approx(0.5e-3)
    assert rates[99] < 1e-6
    assert all(late <= early for early, late in zip(rates[10:], rates[11:]))


def test_averaged_weights_are_there_only_within_the_block():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = HalfLifeEMA([weight], halflife_images=2, batch_images=2, device="cpu")
    for _ in range(3):
        with torch.no_grad():
            weight += 1
        update_ema(ema, [weight])
    with ema_weights(ema, [weight]):
        inside = weight.item()
    assert weight.item() == 3
    assert 0 < inside < 3
    with ema_weights(None, [weight]):
        assert weight.item() == 3


def followed(halflife_images, batch_images, total, change_at):
    """The average after `total` images of a weight that is 0 and becomes 1 after `change_at` of them."""
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = HalfLifeEMA([weight], halflife_images, batch_images, "cpu")
    for seen in range(0, total, batch_images):
        weight.data.fill_(float(seen >= change_at))
        update_ema(ema, [weight])
    return ema.shadow_params[0].item()


def test_the_average_forgets_half_in_a_half_life_of_images_whatever_the_batch():
    for batch in (4, 16, 64):  # ramped up long before
        assert followed(640, batch, 32_000 + 640, 32_000) == pytest.approx(0.5, abs=1e-3)
        assert followed(640, batch, 32_000 + 1280, 32_000) == pytest.approx(0.75, abs=1e-3)


def test_the_average_starts_with_a_short_memory():
    """After 1000 images its half-life is 80 and not a million, and one batch more or less is a detail."""
    values = [followed(1e6, batch, 1000, 800) for batch in (1, 4, 10)]
    assert values == pytest.approx([1 - (800 / 1000) ** (math.log(2) / 0.08)] * 3, abs=0.02)
    assert followed(1e6, 4, 4, 0) > 0.99, "the first update replaces the random start"
