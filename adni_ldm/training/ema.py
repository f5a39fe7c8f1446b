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


def trainable(network: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are not frozen."""
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


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


class HalfLifeAverage(EMAModel):
    """diffusers' moving average, with a memory that is measured in images and not in updates.

    A process more or a larger batch then leaves the average what it was (as in Karras et al. 2022,
    arXiv:2206.00364, code of appendix F).

    Args:
        halflife_images: images after which a weight's part in the average has halved.
        batch_images: images of an update, over all processes and accumulated batches.
    """

    RAMP_UP = 0.08  # at most this share of the images seen, or the random start would stay in for long

    def __init__(self, parameters, halflife_images: float, batch_images: int, **options):
        super().__init__(parameters, **options)
        self.halflife_images, self.batch_images = halflife_images, batch_images

    def get_decay(self, optimization_step: int) -> float:
        """Share of the average that update `optimization_step`, from 1, keeps."""
        seen = optimization_step * self.batch_images
        return 0.5 ** (self.batch_images / min(self.halflife_images, self.RAMP_UP * seen))


def average(
    parameters: Iterable[torch.nn.Parameter],
    halflife_images: float,
    batch_images: int,
    device: torch.device | str,
) -> HalfLifeAverage:
    """Moving average of the weights, kept on `device`: the host's memory, if not where they are trained."""
    parameters = list(parameters)
    sharded = hasattr(parameters[0], "to_local")  # by FSDP, whose tensors know no foreach
    ema = HalfLifeAverage(parameters, halflife_images, batch_images, foreach=not sharded)
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
