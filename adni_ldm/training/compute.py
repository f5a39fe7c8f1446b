"""How networks compute, which changes memory and speed and, up to rounding, nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from adni_ldm.errors import UserError


def refuse_missing_kernels(attention: str, optimizer: str) -> None:
    """Refuse at the start, in one line, what this machine cannot compute.

    Raises:
        UserError: xformers or bitsandbytes are asked for and missing, or there is no CUDA.
    """
    wanted = []
    if attention == "xformers":
        wanted.append(("--attention xformers", "xformers", "pip install 'adni-ldm[xformers]'", "sdpa"))
    if optimizer == "adamw8bit":
        wanted.append(("--optimizer adamw8bit", "bitsandbytes", "pip install bitsandbytes", "adamw"))
    for flag, package, command, other in wanted:
        if not torch.cuda.is_available():
            raise UserError(f"{flag} needs CUDA and none is visible here; take {other}")
        if find_spec(package) is None:
            raise UserError(f"{flag}: {package} is not installed: {command}, or take {other}")


def set_kernels(
    networks: Sequence[ModelMixin],
    compiled: Sequence[nn.Module],
    *,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    on_cpu: bool = False,
    compile: bool = False,
    backend: str = "inductor",
) -> None:
    """Set how networks compute, in place: the names of their weights stay what they are.

    Args:
        networks: diffusers models that are trained.
        compiled: parts of them that `compile` is for.
        gradient_checkpointing: compute the activations again in the backward pass and keep few of them.
        attention: "sdpa", torch's own, or "xformers".
        on_cpu: "sdpa" is then two matrix products and a softmax. The backward pass of torch's fused kernel is
            slow on a CPU: a step of the demo's U-Net takes 1.2 times as long with it.

    Raises:
        UserError: xformers has no kernel for this GPU and torch.
    """
    for network in networks:
        if gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if attention == "sdpa" and on_cpu:
            network.set_attn_processor(AttnProcessor())
        if attention == "xformers":
            try:
                network.enable_xformers_memory_efficient_attention()
            except Exception as error:  # it tries its kernel, which may fail in any way
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"--attention xformers does not run here ({reason}); take sdpa") from error
    if compile:
        for module in compiled:
            module.compile(backend=backend)  # and not torch.compile(module), which renames the weights


def compute_deterministically() -> None:
    """Let every run of this program on this machine give the same bits, slower; call before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
