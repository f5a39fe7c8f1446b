"""A tiny Stable Diffusion with random weights: CLIP text encoder, tokenizer, U-Net, colour VAE, scheduler."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

WORDS = "an mri scan of the brain a patient with alzheimer disease mild cognitive impairment healthy control"
PLACES = 77
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_stable_diffusion(
    folder: Path, prediction_type: str = "epsilon", widths=(32, 64), token_dim: int = 16, in_channels: int = 4
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
        in_channels=in_channels,
        out_channels=4,
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
