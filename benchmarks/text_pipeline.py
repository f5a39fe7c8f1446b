"""A small Stable Diffusion 2 of phantom slices: text-conditioned, from scratch, as diffusers saves it.

It predicts v, as Stable Diffusion 2 does. Its prompts name plane, contrast and group. It stands for what
cannot be downloaded: a model of much other data that a fine-tuning starts from.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, PNDMScheduler
from measure import flags, run
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from adni_ldm.data.slices import SliceTensors, load_slices, to_arrays
from adni_ldm.loading import load_autoencoder
from adni_ldm.models import build_denoiser
from adni_ldm.pipeline import normalize_latents
from adni_ldm.preprocessing.phantom import write_phantom_cohort
from adni_ldm.training.optimizer import build_optimizer

GROUPS = {"AD": "a patient with alzheimer disease", "NC": "a healthy control"}
PLACES = 32  # tokens of a prompt
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE |= {"prediction_type": "v_prediction"}
LEARNING_RATE = 5e-3  # of Muon, as in the demo's preset


def prompt(plane: str, contrast: str, group: str) -> str:
    return f"a {plane} {contrast} mri of {GROUPS[group]}"


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A token for each word of the prompts; no merges of parts."""
    words = " ".join(prompt("sagittal coronal axial", "t1 t2", group) for group in GROUPS).split()
    pieces = ["<|startoftext|>", "<|endoftext|>"]
    merges: list[str] = []
    for word in dict.fromkeys(words):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        pieces += parts
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = ["".join(parts[:2])]
            pieces.append(parts[0])
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(dict.fromkeys(merges)) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder)


def write_cohorts(folder: Path, subjects: int, slices: int, image_size: int) -> None:
    """Sagittal and coronal T1 slices, of `subjects` in all, as one folder; the plane is in the seed."""
    for seed, plane in ((20, "sagittal"), (21, "coronal")):
        part = folder.with_name(plane)
        sizes = {"subjects": subjects // 2, "slices": slices, "image_size": image_size, "seed": seed}
        write_phantom_cohort(part, **sizes, plane=plane)
        for path in part.rglob("*.png"):
            target = folder / path.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


@torch.no_grad()
def encode(vae, slices: SliceTensors) -> torch.Tensor:
    batches = torch.stack([slices[index]["image"] for index in range(len(slices))]).split(64)
    return torch.cat([normalize_latents(vae, vae.encode(batch).latent_dist.mean) for batch in batches])


def train_text_pipeline(folder: Path, data: Path, options) -> None:
    """Train a VAE, then U-Net and text encoder together; writes a StableDiffusionPipeline's folder.

    Its cohort is made in `data`.
    """
    write_cohorts(data, options.text_subjects, options.slices, options.image_size)
    vae_settings = {"data_dir": data, "output_dir": folder / "vae", "image_size": options.image_size}
    vae_settings |= {
        "max_steps": options.text_vae_steps,
        "batch_size": options.vae_batch_size,
        "widths": [16, 32, 64],
    }
    vae_settings |= {"report_to": "none", "checkpointing_steps": 0, "learning_rate": options.learning_rate}
    vae_settings |= {"warmup_steps": options.text_vae_steps // 20}
    run([sys.executable, "train_vae.py", *flags(vae_settings)])

    torch.manual_seed(0)
    vae = load_autoencoder(str(folder / "vae"))
    slices = SliceTensors(to_arrays(load_slices(data)["train"], options.image_size))
    latents = encode(vae, slices)  # (N, C, h, w)
    planes = ["sagittal" if name.startswith("s20") else "coronal" for name in slices.subjects]
    groups = [slices.class_names[label] for label in slices.labels]
    texts = [prompt(plane, "t1", group) for plane, group in zip(planes, groups, strict=True)]

    tokenizer = make_tokenizer(folder / "tokenizer")
    places = {"padding": "max_length", "max_length": PLACES, "return_tensors": "pt"}
    ids, empty = (tokenizer(part, **places).input_ids for part in (texts, [""]))
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": PLACES}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **config, **special))
    unet = build_denoiser(4, latents.shape[-1], widths=(64, 128), token_dim=64, layers_per_block=1)
    scheduler = DDPMScheduler(**SCHEDULE)
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = build_optimizer("muon", parameters, LEARNING_RATE, 0.01)
    cycle = {"pct_start": 0.05, "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, options.text_steps + 1, **cycle)
    for _ in range(options.text_steps):
        rows = torch.randint(len(latents), (options.batch_size,))
        noise = torch.randn_like(latents[rows])
        timesteps = torch.randint(1000, (len(rows),))
        read = torch.where(torch.rand(len(rows), 1) < 0.1, empty, ids[rows])  # (B, PLACES)
        tokens = encoder(read)[0]
        prediction = unet(scheduler.add_noise(latents[rows], noise, timesteps), timesteps, tokens).sample
        loss = (prediction - scheduler.get_velocity(latents[rows], noise, timesteps)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    unet.save_pretrained(folder / "unet")
    encoder.save_pretrained(folder / "text_encoder")
    PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    (folder / "model_index.json").write_text(json.dumps(index))
