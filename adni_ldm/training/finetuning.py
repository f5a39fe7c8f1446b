"""Fine-tuning: which parts of a model are trained, and LoRA beside its weights."""

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
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
    init_from: str | None,
    freeze: Sequence[str],
    lora_rank: int,
    half_frozen: bool,
    accelerator: Accelerator,
) -> None:
    """Check that there is a model to fine-tune, and what LoRA needs.

    Raises UserError for --freeze or --lora_rank without --init_from, LoRA without peft, and
    LoRA or half weights under FSDP.
    """
    for flag, given in (("--freeze", freeze), ("--lora_rank", lora_rank), ("--half_frozen", half_frozen)):
        if given and not init_from:
            raise UserError(f"{flag}: random weights are of no use frozen; add --init_from")
    if lora_rank and find_spec("peft") is None:
        raise UserError("--lora_rank: peft is not installed: pip install 'adni-ldm[lora]'")
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if lora_rank and sharded:
        raise UserError("--lora_rank is small enough for each GPU; start without FSDP")
    if half_frozen and sharded:
        raise UserError("--half_frozen: FSDP takes weights of one precision; start without it")


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
    lora: bool = False,
) -> DDPMScheduler:
    """The noise schedule to train a pipeline on further: its own, but for what is given.

    `note` is called with what that costs.

    Raises UserError for the prediction of noise at zero terminal SNR, and for a change with `lora`, whose
    file does not hold the schedule.
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
        if lora:
            raise UserError(f"{named}: a LoRA keeps the schedule of its base; omit it, or --lora_rank")
        note(f"note: {named} is new to the U-Net of --init_from, which costs it thousands of updates")
    return adapted


def choose_trained(
    denoiser: ConditionalDenoiser,
    frozen: Sequence[str],
    lora_rank: int,
    half_frozen: bool,
    accelerator: Accelerator,
) -> None:
    """Add LoRA if it has a rank, freeze what --freeze names, and halve what is frozen if asked, in place.

    Raises UserError if the file of a LoRA could not hold all that is trained.
    """
    if lora_rank:
        add_lora(denoiser.unet, lora_rank)
    freeze(denoiser, frozen)
    moved = (name for name, weight in denoiser.unet.named_parameters() if weight.requires_grad)
    if lora_rank and (beside := next((name for name in moved if "lora_" not in name), None)):
        raise UserError(
            f"--freeze with --lora_rank: unet.{beside} would be trained, and the LoRA has no place for it"
        )
    if half_frozen:
        halve_frozen(denoiser.unet, accelerator.mixed_precision)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match one of the glob patterns, in place.

    A pattern after "!" is of parameters that are trained; of several that match, the last one counts. Raises
    UserError if a pattern matches no parameter, or nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        chosen = [parameter for name, parameter in parameters.items() if fnmatchcase(name, glob)]
        if not chosen:
            parts = sorted({".".join(name.split(".")[:2]) for name in parameters})
            raise UserError(
                f"--freeze {pattern}: matches no whole name of a weight; there are {', '.join(parts)}, each "
                "followed by .*"
            )
        for parameter in chosen:
            parameter.requires_grad_(glob != pattern)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"--freeze {' '.join(patterns)}: nothing is left to train")


def halve_frozen(unet: UNet2DConditionModel, precision: str) -> None:
    """Convert the frozen matrices and kernels to half precision, in place; autocast computes in it anyway.

    Biases and normalizations, a thousandth of the weights, stay float32. Raises UserError without mixed
    precision.
    """
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise UserError("--half_frozen: the forward pass is float32 here; add --mixed_precision fp16 or bf16")
    for parameter in unet.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(dtypes[precision])


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Freeze the U-Net and add B A of that rank to its weights W, in place (Hu et al. 2022, arXiv:2106.09685,
    equation 3). B starts at zero, so the U-Net's output is unchanged at first."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    # alpha / r is 1: the file then holds nothing but the matrices
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))


def save_lora(denoiser: ConditionalDenoiser, folder: Path) -> None:
    """Write pytorch_lora_weights.safetensors, which `load_lora_weights` applies to the pipeline tuned from.

    It holds the U-Net's LoRA matrices, the class tokens and names, the condition embedding with its config,
    and the records of the training data.
    """
    from peft import get_peft_model_state_dict

    embedding, conditions = denoiser.class_embedding, denoiser.condition_embedding
    weights, metadata = embedding.state_dict(), {"class_names": list(embedding.config.class_names)}
    if conditions is not None:
        weights |= {f"conditions.{name}": value for name, value in conditions.state_dict().items()}
        metadata["conditions"] = {name: dict(about) for name, about in conditions.config.conditions.items()}
    metadata["trained_on"] = list(denoiser.unet.config.get("_trained_on", ()))
    with atomic_content(folder, last=LORA_WEIGHT_NAME_SAFE) as partial:
        ClassConditionalLDMPipeline.save_lora_weights(
            partial,
            unet_lora_layers=get_peft_model_state_dict(denoiser.unet),
            text_encoder_lora_layers=weights,
            text_encoder_lora_adapter_metadata=metadata,
        )


def plain_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain float32 copy of the U-Net with B A added to its weights; of a plain one the U-Net itself."""
    adapted = getattr(unet, "_hf_peft_config_loaded", False)
    if not adapted and all(parameter.dtype == torch.float32 for parameter in unet.parameters()):
        return unet
    plain = copy.deepcopy(unet).float()  # B A may be below the resolution of half precision
    if adapted:
        plain.fuse_lora()
        plain.unload_lora()
    return plain
