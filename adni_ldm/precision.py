"""Mixed precision: which precision this machine supports."""

import os

import torch

from adni_ldm.errors import UserError


def choose_precision(requested: str | None) -> str:
    """Precision of the forward pass: "no" (float32), "fp16" or "bf16".

    The requested one, else that of `accelerate launch`, else bf16 if the hardware supports it. Raises
    UserError for fp16 without a GPU, where half-precision gradients can be neither computed nor scaled.
    """
    precision = requested or os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if has_bf16() else "no")
    if precision == "fp16" and not torch.accelerator.is_available():
        raise UserError(
            "fp16 needs a GPU and none is visible here; run with --mixed_precision bf16 (or no), "
            "without `--config_file accelerate_config.yaml`"
        )
    return precision


def has_bf16() -> bool:
    """Whether the hardware computes in bf16; emulation does not count."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.accelerator.is_available():
        return False
    # torch has no public function for this; without the instructions bf16 is slower than float32
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return any(check() for check in checks if check)
