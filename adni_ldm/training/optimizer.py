"""The optimizer and its learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from accelerate.optimizer import AcceleratedOptimizer


def learning_rate_at(step: int, peak: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up to `peak`, then a half cosine to zero.

    A function of the step alone: it is independent of the number of processes and needs no state on resume.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def build_optimizer(
    kind: str,
    parameters: Iterable[torch.nn.Parameter] | Iterable[dict],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """AdamW of torch ("adamw"), or of bitsandbytes with its moments in 8 bits ("adamw8bit")."""
    options = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas}
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer | AcceleratedOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next update; before the backward pass, in which DeepSpeed updates."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
