"""How networks compute, which changes memory and speed and, up to rounding, nothing else."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from adni_ldm.errors import UserError

EXTRAS = {  # setting: its package, how to install that, and the value that needs none
    "--attention xformers": ("xformers", "pip install -e '.[xformers]' -c constraints-xformers.txt", "sdpa"),
    "--optimizer adamw8bit": ("bitsandbytes", "pip install bitsandbytes", "adamw"),
}


def check_compute_options(attention: str, optimizer: str) -> None:
    """Check at the start that this machine has what `--attention` and `--optimizer` need.

    Raises UserError if xformers or bitsandbytes is not installed, or there is no CUDA device.
    """
    for flag, (package, command, other) in EXTRAS.items():
        if flag not in (f"--attention {attention}", f"--optimizer {optimizer}"):
            continue
        if not torch.cuda.is_available():
            raise UserError(f"{flag} needs CUDA and no CUDA device is visible; use {other}")
        if find_spec(package) is None:
            raise UserError(f"{flag}: {package} is not installed: {command}, or use {other}")


def set_compute_options(
    network: ModelMixin,
    compiled: Sequence[nn.Module],
    *,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    on_cpu: bool = False,
    compile: bool = False,
    backend: str = "inductor",
) -> None:
    """Set how a network computes, in place; the names of its weights do not change.

    `compile` applies to the parts `compiled`. With `on_cpu`, "sdpa" is two matrix products and a softmax: the
    backward pass of torch's fused kernel is slow on a CPU, where a step of the demo's U-Net takes 1.2 times
    as long with it. Raises UserError if xformers has no kernel for this GPU and torch.
    """
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if attention == "sdpa" and on_cpu:
        network.set_attn_processor(AttnProcessor())
    if attention == "xformers":
        try:
            network.enable_xformers_memory_efficient_attention()
        except Exception as error:  # diffusers runs the kernel once, which may fail in any way
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--attention xformers does not run here ({reason}); use sdpa") from error
    if compile:
        for module in compiled:
            module.compile(backend=backend)  # not torch.compile(module), which renames the weights


def use_deterministic_algorithms() -> None:
    """Make every run of a program on a machine give the same bits, at some cost; call before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
