"""Stable Diffusion as a start: its parts, its noise schedule, and class tokens in its text encoder's place.

Loaded are the U-Net, the scheduler, the CLIP text encoder and its tokenizer, each by its own class; no other
part of the folder, and no code in it. The text encoder is used once and dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    infer_diffusers_model_type,
    load_single_file_checkpoint,
)
from huggingface_hub import ModelCard, hf_hub_download, snapshot_download

from adni_ldm.errors import UserError
from adni_ldm.models import ClassEmbedding
from adni_ldm.models.components import check_model_folder

FITS = (
    "what fits is a latent text-to-image pipeline of diffusers with a UNet2DConditionModel, an AutoencoderKL "
    "and a CLIPTextModel, such as Stable Diffusion 1.x or 2.x"
)
EXPECTED = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
# Options of a U-Net that needs more than latents, a timestep and tokens.
NEEDS_MORE = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
NEEDS_MORE += ("time_cond_proj_dim",)  # latent consistency models
GROUPS = {
    "AD": "a patient with Alzheimer's disease",
    "MCI": "a patient with mild cognitive impairment",
    "NC": "a healthy control",
}


def check_parts(name: str, index: Mapping[str, Any]) -> None:
    """Raise UserError unless a model_index.json names the parts of Stable Diffusion 1.x or 2.x."""
    kind = str(index.get("_class_name"))
    if "Inpaint" in kind or "XL" in kind or "text_encoder_2" in index or "transformer" in index:
        raise UserError(f"{name}: {kind} does not fit; {FITS}")
    for part, expected in EXPECTED.items():
        found = (index.get(part) or [None, None])[1]
        if found != expected and not (part == "text_encoder" and found is None):
            raise UserError(f"{name}: {kind} has {found or 'nothing'} as its {part}; {FITS}")


def check_unet(name: str, unet: UNet2DConditionModel, latent_channels: int) -> None:
    """Raise UserError unless the U-Net takes latents, a timestep and tokens, and nothing else."""
    channels = unet.config.in_channels
    if channels != latent_channels:
        kind = "an inpainting U-Net" if channels == 2 * latent_channels + 1 else "a U-Net"
        raise UserError(f"{name}: {kind} of {channels} channels, for latents of {latent_channels}; {FITS}")
    if unet.config.out_channels != channels:
        raise UserError(
            f"{name}: its U-Net predicts {unet.config.out_channels} channels of {channels}, and so more than "
            f"noise or velocity; {FITS}"
        )
    for option in NEEDS_MORE:
        if value := unet.config.get(option):
            raise UserError(f"{name}: its U-Net needs further inputs ({option}={value}); {FITS}")


def weights_files(variant: str | None, name: str = "diffusion_pytorch_model") -> list[str]:
    """Patterns of the files of a component: config and weights of this variant, whole or in shards."""
    weights = f"{name}.{variant}" if variant else name
    return ["config.json", f"{weights}.safetensors", f"{weights}-*.safetensors", f"{name}*.index*.json"]


def files(variant: str | None, without_vae: bool) -> list[str]:
    """Patterns of the files that are loaded of a pipeline; never the safety checker."""
    parts = ["unet"] if without_vae else ["unet", "vae"]
    found = [f"{part}/{file}" for part in parts for file in weights_files(variant)]
    found += [f"text_encoder/{file}" for file in weights_files(variant, "model")]
    found += ["vae/config.json", "tokenizer/*.json", "tokenizer/merges.txt", "scheduler/*.json"]
    return ["model_index.json", "README.md", *found]


def load_parts(name: str, folder: Path, variant: str | None = None) -> dict[str, Any]:
    """The U-Net, scheduler and, where there are any, text encoder and tokenizer of a pipeline's folder."""
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    components = check_model_folder(folder)
    options = {"variant": variant, "use_safetensors": True}
    # The scheduler by its own class, whose defaults stand for what its config omits.
    scheduler_class = getattr(diffusers, components["scheduler"][1])
    parts = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **options),
        "scheduler": scheduler_class.from_pretrained(folder / "scheduler"),
    }
    if "text_encoder" in components:
        encoder = folder / "text_encoder"
        parts["text_encoder"] = CLIPTextModel.from_pretrained(encoder, dtype=torch.float32, **options)
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    return parts


def load_single_file(path: str) -> dict[str, Any]:
    """The parts, the VAE among them, of a .safetensors checkpoint in the layout of its authors.

    Their configuration and the tokenizer's files are those of the pipeline that diffusers takes for this
    kind of checkpoint, from the Hub or its cache.
    """
    kind = infer_diffusers_model_type(load_single_file_checkpoint(path))
    if kind not in ("v1", "v2"):
        raise UserError(f"{path}: a checkpoint of the kind {kind} does not fit; {FITS}")
    config = DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]
    patterns = ["*.json", "tokenizer/*"]
    try:
        folder = snapshot_download(config, allow_patterns=patterns)
    except OSError as error:  # those of the Hub's client are OSErrors
        raise UserError(
            f"{path}: its configuration is that of {config}, which is not in the cache and cannot be "
            f"downloaded here; where it can: hf download {config} --include {' '.join(map(repr, patterns))}"
        ) from error
    options = {"torch_dtype": torch.float32, "safety_checker": None, "feature_extractor": None}
    return StableDiffusionPipeline.from_single_file(path, config=folder, **options).components


def to_ddim(name: str, scheduler: SchedulerMixin) -> DDIMScheduler:
    """DDIM on the noise schedule of another scheduler, with its prediction type and its last timestep."""
    # Every option of DDIM by value: from_config would replace what were defaults of the other class.
    config = {
        key: scheduler.config[key]
        for key in inspect.signature(DDIMScheduler).parameters
        if key in scheduler.config
    }
    ddim = DDIMScheduler(**config | {"clip_sample": False})  # latents are not confined to [-1, 1]
    alphas = getattr(scheduler, "alphas_cumprod", torch.zeros(1))  # (num_train_timesteps,)
    same = alphas.shape == ddim.alphas_cumprod.shape and torch.allclose(
        alphas.sqrt(), ddim.alphas_cumprod.sqrt(), atol=1e-3
    )
    kind = ddim.config.prediction_type
    if not same or kind not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{name}: {type(scheduler).__name__}, of prediction type {kind}, has no noise schedule of a DDPM "
            f"that predicts noise or velocity; {FITS}"
        )
    return ddim


def default_prompt(class_name: str) -> str:
    """The prompt of a class for which --class_prompts has none."""
    return f"an MRI scan of the brain of {GROUPS.get(class_name, class_name)}"


@torch.no_grad()
def class_tokens(
    name: str,
    parts: Mapping[str, Any],
    class_names: Sequence[str],
    prompts: Mapping[str, str],
    tokens_per_class: int,
    note: Callable[[str], None],
) -> ClassEmbedding:
    """A class embedding that starts at the text encoder's output for a prompt of each class.

    The null class has the empty prompt. Without a text encoder the tokens are random, of unit variance as
    after the layer normalization that ends CLIP's. `note` is called with the prompts. Raises UserError if
    the text encoder is not as wide as the U-Net reads, or there is none to encode `prompts`.
    """
    width = parts["unet"].config.cross_attention_dim
    embedding = ClassEmbedding(class_names, width, tokens_per_class)
    if parts.get("text_encoder") is None:
        if prompts:
            raise UserError(f"--class_prompts: {name} has no text encoder; omit them")
        return embedding
    texts = {cls: prompts.get(cls, default_prompt(cls)) for cls in class_names}
    note(f"class tokens start at the prompts {', '.join(f'{cls}={text!r}' for cls, text in texts.items())}")
    tokens = encode_prompts(
        parts["tokenizer"], parts["text_encoder"], [*texts.values(), ""], tokens_per_class
    )
    if tokens.shape[-1] != width:
        raise UserError(
            f"{name}: its text encoder is {tokens.shape[-1]} wide, its U-Net reads {width}; {FITS}"
        )
    embedding.table.weight.copy_(tokens.flatten(1))
    return embedding


def encode_prompts(tokenizer, text_encoder, prompts: Sequence[str], count: int) -> torch.Tensor:
    """The text encoder's output (B, count, D) at the end of each prompt and at the places before it.

    Two are those of the last word and of the end, which has attended to the whole prompt. Where a prompt has
    fewer places, those of the padding follow, so that all of them are what Stable Diffusion reads.
    """
    # A tokenizer without model_max_length has an immense one.
    length = min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings)
    if count > length:
        raise UserError(f"--tokens_per_class {count}: the text encoder has {length} places")
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length)
    for prompt, places in zip(prompts, encoded.input_ids):
        if len(places) > length:
            raise UserError(f"--class_prompts {prompt!r} has {len(places)} tokens; at most {length} fit")
    mask = torch.tensor(encoded.attention_mask)  # (B, length); 1 up to the end of the prompt
    attended = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    hidden = text_encoder(torch.tensor(encoded.input_ids), attention_mask=attended)[0]  # (B, length, D)
    start = (mask.sum(dim=1) - count).clamp(0, length - count)  # (B,)
    places = start[:, None] + torch.arange(count)  # (B, count)
    return hidden[torch.arange(len(prompts))[:, None], places]


def describe_base(name: str, revision: str | None = None) -> dict[str, str]:
    """Name and licence of a model from elsewhere, for the records; the licence as its card states it."""
    path = Path(name)
    shown = path.resolve().name if path.exists() else "@".join(filter(None, (name, revision)))
    try:
        card = path / "README.md" if path.exists() else hf_hub_download(name, "README.md", revision=revision)
        license = ModelCard.load(card).data.license
    except (OSError, ValueError, yaml.YAMLError):  # those of the Hub's client are OSErrors
        license = None
    return {"name": shown, "license": str(license or "not stated")}
