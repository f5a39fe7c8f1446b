"""Learning rate and averaged weights."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from adni_ldm.training.optimization import averaged_weights, learning_rate_at


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate_at(step, 1e-3, warmup_steps=10, max_steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert rates[55] == pytest.approx(0.5e-3)
    assert rates[99] < 1e-6
    assert all(late <= early for early, late in zip(rates[10:], rates[11:]))


def test_averaged_weights_are_there_only_within_the_block():
    weight = torch.nn.Parameter(torch.zeros(1))
    ema = EMAModel([weight], decay=0.5)
    for _ in range(3):
        with torch.no_grad():
            weight += 1
        ema.step([weight])
    with averaged_weights(ema, [weight]):
        inside = weight.item()
    assert weight.item() == 3
    assert 0 < inside < 3
    with averaged_weights(None, [weight]):
        assert weight.item() == 3
