"""The optimizer's schedule and the average of weights that is sampled from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up to `peak`, then a half cosine to zero.

    A function of the step alone: the number of processes does not enter, and nothing needs resuming.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    kind: str,
    parameters: Iterable[torch.nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """AdamW of torch ("adamw"), or of bitsandbytes with moments in 8 bits ("adamw8bit")."""
    options = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas}
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer | AcceleratedOptimizer, learning_rate: float) -> None:
    """Set it for the next update. Before the backward pass, within which DeepSpeed takes the update."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def average(parameters: Iterable[torch.nn.Parameter], decay: float, device: torch.device | str) -> EMAModel:
    """Moving average of the weights, kept on `device`: the host's memory, if not where they are trained."""
    parameters = list(parameters)
    sharded = hasattr(parameters[0], "to_local")  # by FSDP, whose tensors know no foreach
    ema = EMAModel(parameters, decay=decay, foreach=not sharded)
    ema.to(device)
    return ema


def update_average(ema: EMAModel, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let the average follow the weights, wherever it is kept."""
    parameters = list(parameters)
    device = ema.shadow_params[0].device
    if parameters[0].device != device:
        # Parameters again, since EMAModel copies what asks for no gradient and averages the rest.
        parameters = [
            torch.nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
            for parameter in parameters
        ]
    ema.step(parameters)


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
