"""A tiny Stable Diffusion with random weights: CLIP text encoder, tokenizer, U-Net, colour VAE, scheduler."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

WORDS = "an mri scan of the brain a patient with alzheimer disease mild cognitive impairment healthy control"
PLACES = 77
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_stable_diffusion(
    folder: Path, prediction_type: str = "epsilon", widths=(32, 64), token_dim: int = 16, **unet_options
) -> Path:
    """As the Hub has it: PNDM, 3 channels, a tokenizer without model_max_length, a safety checker."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=token_dim,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PLACES,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    CLIPTextModel(text).eval().save_pretrained(folder / "text_encoder")
    levels = len(widths)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=16,
        scaling_factor=0.18215,
        sample_size=512,
    )
    vae.save_pretrained(folder / "vae")
    unet = UNet2DConditionModel(
        sample_size=64,
        **{"in_channels": 4, "out_channels": 4} | unet_options,
        block_out_channels=tuple(widths),
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        layers_per_block=1,
        cross_attention_dim=token_dim,
        attention_head_dim=[2] * levels,
        use_linear_projection=True,
    )
    unet.save_pretrained(folder / "unet")
    scheduler = PNDMScheduler(
        **SCHEDULE, steps_offset=1, skip_prk_steps=True, prediction_type=prediction_type
    )
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "feature_extractor": [None, None]}
    index |= {name: ["transformers", kind] for name, kind in CLIP.items()}
    index["safety_checker"] = [
        "stable_diffusion",
        "StableDiffusionSafetyChecker",
    ]  # of which there is no folder
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\nA model.\n")
    return folder


CLIP = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}


def write_tokenizer(folder: Path) -> None:
    """Letters, and the words of WORDS by merges; no model_max_length."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WORDS.split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# Names of diffusers' parts, and those of the authors of Stable Diffusion: beginnings by block, then endings.
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
RESNET_NAMES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET_NAMES |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_NAMES = {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
VAE_NAMES |= {"mid_block.attentions.0": "mid.attn_1", "conv_norm_out": "norm_out", "group_norm": "norm"}
VAE_NAMES |= {"down_blocks.": "down.", "up_blocks.0": "up.1", "up_blocks.1": "up.0", "resnets": "block"}
VAE_NAMES |= {"downsamplers.0": "downsample", "upsamplers.0": "upsample", "conv_shortcut": "nin_shortcut"}
VAE_NAMES |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def write_single_file(folder: Path, file: Path) -> Path:
    """The checkpoint of `write_stable_diffusion`, of two levels, in the layout of its authors."""
    weights = {}
    for name, value in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        old = max((start for start in UNET_NAMES if name.startswith(start + ".")), key=len)
        rest = name.removeprefix(old)
        for part, other in RESNET_NAMES.items() if "resnets" in old else ():
            rest = rest.replace(f".{part}.", f".{other}.")
        weights[f"model.diffusion_model.{UNET_NAMES[old]}{rest}"] = value
    for name, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        for part, other in VAE_NAMES.items():
            name = name.replace(part, other)
        attention = "attn_1" in name and value.ndim == 2  # a convolution there
        weights[f"first_stage_model.{name}"] = value[:, :, None, None] if attention else value
    for name, value in load_file(folder / "text_encoder/model.safetensors").items():
        name = name.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{name}"] = value
    save_file({name: value.contiguous() for name, value in weights.items()}, file)
    return file
