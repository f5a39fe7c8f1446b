"""The optimizer's schedule and the average of weights that is sampled from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up to `peak`, then a half cosine to zero.

    A function of the step alone: the number of processes does not enter, and nothing needs resuming.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


@contextmanager
def averaged_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within the block the parameters hold their average; without an `ema` they stay what they are."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
