"""Fine-tuning: which parts of a model are trained, and LoRA beside its weights."""

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from accelerate.utils import DistributedType
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import nn

from adni_ldm.config.training import NO_EPSILON
from adni_ldm.errors import UserError
from adni_ldm.files import atomic_content
from adni_ldm.models.denoiser import ConditionalDenoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline

# Attention, which reads the class tokens, and the residual blocks' convolutions, which model appearance.
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")


def check_start(
    init_from: str | None, freeze: Sequence[str], lora_rank: int, distributed_type: DistributedType
) -> None:
    """Check that there is a model to fine-tune, and what LoRA needs.

    Raises UserError for --freeze or --lora_rank without --init_from, and LoRA without peft or under FSDP.
    """
    for flag, given in (("--freeze", freeze), ("--lora_rank", lora_rank)):
        if given and not init_from:
            raise UserError(f"{flag}: random weights are of no use frozen; add --init_from")
    if lora_rank and find_spec("peft") is None:
        raise UserError("--lora_rank: peft is not installed: pip install 'adni-ldm[lora]'")
    if lora_rank and distributed_type == DistributedType.FSDP:
        raise UserError("--lora_rank is small enough for each GPU; start without FSDP")


def set_latent_size(unet: UNet2DConditionModel, channels: int, latent_size: int) -> None:
    """Set the side of the latents that the U-Net denoises, in place; its weights do not depend on it.

    Raises UserError if the side cannot be halved as often as the U-Net does, or the channels differ.
    """
    if channels != unet.config.in_channels:
        raise UserError(
            f"--vae: its latents have {channels} channels and the U-Net of --init_from takes "
            f"{unet.config.in_channels}; fine-tune that pipeline's own with train_vae.py --init_from"
        )
    factor = 2 ** (len(unet.config.block_out_channels) - 1)
    if latent_size % factor:
        raise UserError(
            f"--image_size: latents of {latent_size} x {latent_size} cannot be halved as often as the U-Net "
            f"of --init_from does; their side must be a multiple of {factor}"
        )
    unet.register_to_config(sample_size=latent_size)


def adapt_schedule(
    scheduler: DDIMScheduler,
    prediction_type: str | None,
    rescale_betas_zero_snr: bool | None,
    note: Callable[[str], None],
) -> DDPMScheduler:
    """The noise schedule to train a pipeline on further: its own, but for what is given.

    `note` is called with what that costs.

    Raises UserError for the prediction of noise at zero terminal SNR.
    """
    # Without the note of what were defaults, which from_config would keep in place of what is given.
    config = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
    given: dict[str, object] = {"prediction_type": prediction_type}
    given["rescale_betas_zero_snr"] = rescale_betas_zero_snr
    changed = {name: value for name, value in given.items() if value not in (None, config[name])}
    if changed.get("rescale_betas_zero_snr"):
        changed["timestep_spacing"] = "trailing"  # sampling starts at the last timestep, which is pure noise
    adapted = DDPMScheduler.from_config({**config, **changed})
    if adapted.config.rescale_betas_zero_snr and adapted.config.prediction_type == "epsilon":
        raise UserError(NO_EPSILON)
    if named := ", ".join(f"--{name} {value}" for name, value in changed.items() if name in given):
        note(f"note: {named} is new to the U-Net of --init_from, which costs it thousands of updates")
    return adapted


def choose_trained(denoiser: ConditionalDenoiser, frozen: Sequence[str], lora_rank: int) -> None:
    """Add LoRA if it has a rank, and freeze what --freeze names, in place."""
    if lora_rank:
        add_lora(denoiser.unet, lora_rank)
    freeze(denoiser, frozen)


def freeze(network: nn.Module, prefixes: Sequence[str]) -> None:
    """Freeze the parameters whose names begin with one of the prefixes, in place.

    Raises UserError if a prefix matches no parameter, or nothing is left to train.
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
    """Freeze the U-Net and add B A of that rank to its weights W, in place (Hu et al. 2022, arXiv:2106.09685,
    equation 3). B starts at zero, so the U-Net's output is unchanged at first."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    # alpha / r is 1: the file then holds nothing but the matrices
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))


def save_lora(denoiser: ConditionalDenoiser, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, which `load_lora_weights` applies to the pipeline tuned from.

    It holds the U-Net's LoRA matrices, the class tokens and names, and the records of the training data.
    """
    from peft import get_peft_model_state_dict

    embedding = denoiser.class_embedding
    metadata = {"class_names": list(embedding.config.class_names)}
    metadata["trained_on"] = list(denoiser.unet.config.get("_trained_on", ()))
    with atomic_content(folder, last=LORA_WEIGHT_NAME_SAFE) as partial:
        ClassConditionalLDMPipeline.save_lora_weights(
            partial,
            unet_lora_layers=get_peft_model_state_dict(denoiser.unet),
            text_encoder_lora_layers=embedding.state_dict(),
            text_encoder_lora_adapter_metadata=metadata,
        )


def merge_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain copy of the U-Net with B A added to its weights; without LoRA the U-Net itself."""
    if not getattr(unet, "_hf_peft_config_loaded", False):
        return unet
    merged = copy.deepcopy(unet)
    merged.fuse_lora()
    merged.unload_lora()
    return merged
