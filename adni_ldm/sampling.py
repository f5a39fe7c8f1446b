"""Drawing many images: which sampler, which seed, in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import diffusers
import numpy as np
import torch

from adni_ldm.pipeline import ClassConditionalLDMPipeline

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def use_scheduler(pipeline: ClassConditionalLDMPipeline, name: str) -> None:
    """Give the pipeline another sampler for the same noise schedule; `name` is one of SCHEDULERS."""
    class_name, options = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(pipeline.scheduler.config, **options)


def image_seed(seed: int, index: int) -> int:
    """Seed of image `index` of a run with `seed`; hashed, so that neighbouring seeds share no image."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0])


def draw_images(
    pipeline: ClassConditionalLDMPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    precision: str = "no",
    **options,
) -> Iterator[torch.Tensor]:
    """Draw an image for each label from the seed beside it, in batches (B, 1, H, W) in [0, 1], on the CPU.

    Each image has a generator of its own, so it depends on its seed and not on its batch (up to the
    rounding of batched arithmetic).

    Args:
        precision: "no", "fp16" or "bf16", of the U-Net alone.
        options: further arguments of the pipeline's call.
    """
    device = pipeline.device
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    for first in range(0, len(labels), batch_size):
        batch = slice(first, first + batch_size)
        # seeded on the CPU: a seed means the same noise on every machine
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
        with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
            yield (
                pipeline(list(labels[batch]), generator=generators, output_type="pt", **options)
                .images.float()
                .cpu()
            )


def draw_trajectory(
    pipeline: ClassConditionalLDMPipeline, label: int, seed: int, frames: int, **options
) -> torch.Tensor:
    """One image coming out of the noise: (frames, 1, H, W) in [0, 1], from pure noise to the image.

    Args:
        options: further arguments of the pipeline's call.
    """
    shape = (1, pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pipeline.device)]

    def keep(_pipeline, _step, _timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    pipeline(label, latents=latents[0], output_type="latent", callback_on_step_end=keep, **options)
    chosen = torch.linspace(0, len(latents) - 1, min(frames, len(latents))).round().int()
    return pipeline.decode_latents(torch.cat([latents[index] for index in chosen])).float().cpu()


def weights_hash(pipeline: ClassConditionalLDMPipeline) -> str:
    """`hash_weights` of all that is trained: tells which model an image came from."""
    return hash_weights(pipeline.vae, pipeline.unet, pipeline.class_embedding)


def hash_weights(*modules: torch.nn.Module) -> str:
    """SHA-256 over the names and values of the modules' weights, first 16 hex digits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
