"""What of a model is trained when it goes on from another: parts by name, or a LoRA beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.models.denoiser import ConditionalDenoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline

# Attention, which reads the class, and the residual blocks' convolutions, which hold what things look like.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")


def refuse_missing_start(init_from: str | None, freeze: Sequence[str], lora_rank: int) -> None:
    """Refuse at the start, in one line, what needs a model to go on from, or a library that is not there.

    Raises:
        UserError: it is missing.
    """
    for flag, given in (("--freeze", freeze), ("--lora_rank", lora_rank)):
        if given and not init_from:
            raise UserError(f"{flag}: random weights are of no use frozen; add --init_from")
    if lora_rank and find_spec("peft") is None:
        raise UserError("--lora_rank: peft is not installed: pip install 'adni-ldm[lora]'")


def fit(unet: UNet2DConditionModel, channels: int, latent_size: int) -> None:
    """Let the U-Net take latents of another side, in place; its weights know none.

    Raises:
        UserError: the side cannot be halved as often as the U-Net does, or the channels are other ones.
    """
    if channels != unet.config.in_channels:
        raise UserError(
            f"--vae: its latents have {channels} channels and the U-Net of --init_from takes "
            f"{unet.config.in_channels}; tune that pipeline's own with train_vae.py --init_from"
        )
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if latent_size % factor:
        raise UserError(
            f"--image_size: latents of {latent_size} x {latent_size} cannot be halved as often as the U-Net "
            f"of --init_from does; their side must be a multiple of {factor}"
        )
    unet.register_to_config(sample_size=latent_size)


def freeze(network: nn.Module, prefixes: Sequence[str]) -> None:
    """Take the parameters whose names begin so out of training.

    Raises:
        UserError: a prefix fits no parameter, or nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    for prefix in prefixes:
        chosen = [parameter for name, parameter in parameters.items() if name.startswith(prefix)]
        if not chosen:
            parts = sorted({".".join(name.split(".")[:2]) for name in parameters})
            raise UserError(
                f"--freeze {prefix}: no such part; there are {', '.join(parts)}, and parts of them"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"--freeze {' '.join(prefixes)}: nothing is left to train")


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the U-Net and put W + B A beside its weights W, with B and A of that rank (Hu et al. 2022,
    arXiv:2106.09685, equation 3). B starts as zero, so the U-Net starts as it was."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    # alpha / r is 1: the file then needs to say nothing but its matrices
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))


def save_lora(denoiser: ConditionalDenoiser, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors: what `load_lora_weights` lays over the pipeline tuned from.

    It holds the U-Net's matrices and the class tokens as they are now, with the names of the classes and the
    records of what it was trained on.
    """
    from peft import get_peft_model_state_dict

    embedding = denoiser.class_embedding
    told = {"class_names": list(embedding.config.class_names)}
    told["trained_on"] = list(denoiser.unet.config.get("_trained_on", ()))
    ClassConditionalLDMPipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(denoiser.unet),
        text_encoder_lora_layers=embedding.state_dict(),
        text_encoder_lora_adapter_metadata=told,
    )


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Add B A to the weights and leave a plain U-Net, in place."""
    unet.fuse_lora()
    unet.unload_lora()
