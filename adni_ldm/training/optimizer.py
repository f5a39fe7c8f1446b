"""The optimizer and its learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType

from adni_ldm.errors import UserError


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
    """AdamW of torch ("adamw"), or of bitsandbytes with its moments in 8 bits ("adamw8bit"); or Muon."""
    options = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas}
    if kind == "muon":
        return Muon(parameters, **options)
    if kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def check_optimizer(kind: str, distributed_type: DistributedType) -> None:
    """Raise UserError for Muon under FSDP and DeepSpeed, where a process holds a part of a matrix only."""
    if kind == "muon" and distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"--optimizer muon needs whole matrices, which {distributed_type.value} shards: use adamw, or "
            "accelerate_config.yaml"
        )


class Muon(torch.optim.AdamW):
    """Muon for matrices, and for kernels as matrices (out, in · k · k); AdamW for all other parameters.

    The momentum of a matrix is replaced by the nearest orthogonal matrix, so that all its directions are
    learned at one rate (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), scaled by
    0.2 √max(m, n), with which AdamW's learning rate and weight decay serve both (Liu et al. 2025,
    arXiv:2502.16982, equation 4). torch's own Muon takes no kernels, and computes in bfloat16, which most
    CPUs emulate.
    """

    MOMENTUM = 0.95
    SMALLEST = 16  # rows or columns: the first and the last layer, class tokens, and LoRA are AdamW's

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient; the gradients of the matrices are used up."""
        by_shape: dict[torch.Size, list] = {}  # matrices of one shape are orthogonalized together
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2 or min(parameter.shape[:2]) < self.SMALLEST or parameter.grad is None:
                    continue
                state, gradient = self.state[parameter], parameter.grad
                if not state:  # AdamW's loading of a state expects a "step" in it
                    state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(parameter))
                momentum = state["momentum_buffer"]
                momentum.lerp_(gradient, 1 - self.MOMENTUM)
                update = gradient.lerp(momentum, self.MOMENTUM).flatten(1)  # Nesterov
                by_shape.setdefault(update.shape, []).append((group, parameter, update))
                parameter.grad = None
        for shape, members in by_shape.items():
            updates = orthogonalize(torch.stack([update for _, _, update in members]))
            for (group, parameter, _), update in zip(members, updates * 0.2 * max(shape) ** 0.5):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=group["lr"])
        return super().step(closure)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace the singular values of matrices (B, m, n) by ones, up to 30 %, which Muon does not mind.

    The quintic Newton-Schulz iteration of Jordan et al. 2024, X ← (a I + b X Xᵀ + c (X Xᵀ)²) X, in float32.
    It is carried out on the Gram matrix of the shorter side, a quarter of the work for a 3 x 3 kernel.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, steps).mT
    a, b, c = 3.4445, -4.7750, 2.0315
    start = matrices.float() / (matrices.float().norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram = start @ start.mT  # (B, m, m)
    one = torch.eye(gram.shape[1], device=gram.device).expand_as(gram)
    product = one
    for _ in range(steps):
        factor = a * one + b * gram + c * (gram @ gram)
        product, gram = factor @ product, factor @ gram @ factor
    return (product @ start).to(matrices.dtype)


def set_learning_rate(optimizer: torch.optim.Optimizer | AcceleratedOptimizer, learning_rate: float) -> None:
    """Set the learning rate of the next update; before the backward pass, in which DeepSpeed updates."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
