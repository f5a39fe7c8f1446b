"""What a trained model itself makes of given slices: its loss, its U-Net's bottleneck, its reconstructions.

Noise and timesteps are the same for all slices, so that slices differ by what they show and not by luck.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from adni_ldm.errors import UserError
from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.precision import has_bf16

LEVELS = (0.1, 0.2, 0.3)  # where the loss is taken, shares of training's timesteps
BOTTLENECK_LEVEL = 0.2


@torch.no_grad()
def denoising_losses(
    pipeline: ClassConditionalLDMPipeline, images: ImageSet, batch_size: int = 64, seed: int = 0
) -> np.ndarray:
    """The model's own loss on each slice given its class, (N,) float64: mean over LEVELS, a noise each.

    The squared error of what the U-Net was trained to say, the noise or the velocity, in float32. Costs
    len(LEVELS) passes of the U-Net a slice.

    Raises:
        UserError: slices of another size than the model draws.
        ValueError: a class that the model does not know.
    """
    known = np.array(pipeline.class_embedding.labels_of(images.class_names))
    labels = torch.from_numpy(known[images.labels])
    losses = [np.zeros(0)]
    for rows, latents in _latent_batches(pipeline, images, batch_size, "the model's loss"):
        tokens = pipeline.class_embedding(labels[rows].to(latents.device)).tokens  # (B, 2, D)
        of_levels = []
        for index, level in enumerate(LEVELS):
            noise, timestep, alpha = _noise(pipeline, latents, level, seed + index)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            prediction = _predict(pipeline, noisy, timestep, tokens)
            target = noise
            if pipeline.scheduler.config.prediction_type == "v_prediction":
                target = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
            of_levels.append((prediction - target).square().mean(dim=(1, 2, 3)))
        losses.append(torch.stack(of_levels).mean(dim=0).double().cpu().numpy())
    return np.concatenate(losses)


@torch.no_grad()
def bottleneck_features(
    pipeline: ClassConditionalLDMPipeline, images: ImageSet, batch_size: int = 64, seed: int = 0
) -> np.ndarray:
    """What leaves the U-Net's middle block, (N, D) float32, for slices with a little noise and no class.

    The h-space of Kwon et al. 2023 (arXiv:2210.10960). The null class is given, so that what tells the
    classes apart is what the slices show, and not the label.
    """
    caught = []
    hook = pipeline.unet.mid_block.register_forward_hook(
        lambda _module, _inputs, output: caught.append(output)
    )
    features = []
    try:
        for rows, latents in _latent_batches(pipeline, images, batch_size, "the U-Net's bottleneck"):
            null = torch.full((len(rows),), pipeline.class_embedding.null_label, device=latents.device)
            noise, timestep, alpha = _noise(pipeline, latents, BOTTLENECK_LEVEL, seed)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            _predict(pipeline, noisy, timestep, pipeline.class_embedding(null).tokens)
            features.append(caught.pop().flatten(1).float().cpu().numpy())
    finally:
        hook.remove()
    return np.concatenate(features)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: ImageSet, batch_size: int = 64) -> torch.Tensor:
    """What the autoencoder keeps of the slices: float32 (N, 1, H, W) in [-1, 1], on the CPU."""
    parts = [torch.empty(0, *images.images.shape[1:])]
    for first in range(0, len(images), batch_size):
        batch = images.floats(slice(first, first + batch_size)).to(vae.device, vae.dtype)
        parts.append(vae.decode(vae.encode(batch).latent_dist.mode()).sample.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def _latent_batches(
    pipeline: ClassConditionalLDMPipeline, images: ImageSet, batch_size: int, title: str
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows (B,) and their normalized latents (B, C, h, w): the means of the posteriors, nothing drawn."""
    drawn, given = pipeline.unet.config.sample_size * pipeline.vae_scale_factor, images.images.shape[-1]
    if drawn != given:
        raise UserError(f"slices of {given} pixels for a model that draws {drawn}; give --image_size {drawn}")
    vae = pipeline.vae
    for first in tqdm(range(0, len(images), batch_size), desc=title, leave=False):
        rows = np.arange(first, min(first + batch_size, len(images)))
        posterior = vae.encode(images.floats(rows).to(vae.device, vae.dtype)).latent_dist
        yield rows, normalize_latents(vae, posterior.mode())


def _predict(
    pipeline: ClassConditionalLDMPipeline, noisy: torch.Tensor, timestep: int, tokens: torch.Tensor
) -> torch.Tensor:
    """What the U-Net says of latents (B, C, h, w), float32; computed in bf16 where the hardware does."""
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=has_bf16()):
        return pipeline.unet(noisy.to(pipeline.unet.dtype), timestep, tokens).sample.float()


def _noise(
    pipeline: ClassConditionalLDMPipeline, latents: torch.Tensor, level: float, seed: int
) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Noise (1, C, h, w) that all slices share, the timestep at `level`, and ᾱ there."""
    timestep = int(level * pipeline.scheduler.config.num_train_timesteps)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every machine
    noise = torch.randn(1, *latents.shape[1:], generator=generator).to(latents.device)
    return noise, timestep, pipeline.scheduler.alphas_cumprod[timestep].to(latents.device)
