"""Outputs of a trained model on given slices: denoising loss, U-Net bottleneck and reconstructions.

Noise and timesteps are the same for all slices, so differences between slices are not due to chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from tqdm.auto import tqdm

from adni_ldm.errors import UserError
from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.precision import has_bf16

LEVELS = (0.1, 0.2, 0.3)  # timesteps of the loss, as fractions of the training timesteps
BOTTLENECK_LEVEL = 0.2


@torch.no_grad()
def denoising_losses(
    pipeline: ClassConditionalLDMPipeline, images: ImageSet, batch_size: int = 64, seed: int = 0
) -> np.ndarray:
    """The model's loss on each slice given its class, (N,) float64: mean over LEVELS, one noise each.

    The squared error of the training target (noise or velocity), in float32. Costs len(LEVELS) passes of the
    U-Net per slice.

    Raises:
        UserError: slices of another size than the model generates.
        ValueError: a class that the model was not trained on.
    """
    known = np.array(pipeline.class_embedding.labels_of(images.class_names))
    labels = torch.from_numpy(known[images.labels])
    losses = [np.zeros(0)]
    for rows, latents in _latent_batches(pipeline, images, batch_size, "denoising loss"):
        tokens = pipeline.encode_classes(labels[rows].to(latents.device))  # (B, 2 + K, D)
        of_levels = []
        for index, level in enumerate(LEVELS):
            noisy, noise, timesteps, scheduler = _add_noise(pipeline, latents, level, seed + index)
            velocity = scheduler.config.prediction_type == "v_prediction"
            target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
            error = _predict(pipeline, noisy, timesteps, tokens) - target
            of_levels.append(error.square().mean(dim=(1, 2, 3)))
        losses.append(torch.stack(of_levels).mean(dim=0).double().cpu().numpy())
    return np.concatenate(losses)


@torch.no_grad()
def bottleneck_features(
    pipeline: ClassConditionalLDMPipeline, images: ImageSet, batch_size: int = 64, seed: int = 0
) -> np.ndarray:
    """Output of the U-Net's middle block, (N, D) float32, for slices with little noise and no class.

    The h-space of Kwon et al. 2023 (arXiv:2210.10960). The null class is given, so that classes are separated
    by what the slices show and not by the label.
    """
    outputs = []
    hook = pipeline.unet.mid_block.register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output)
    )
    features = []
    try:
        for rows, latents in _latent_batches(pipeline, images, batch_size, "U-Net bottleneck"):
            null = torch.full((len(rows),), pipeline.class_embedding.null_label, device=latents.device)
            noisy, _, timesteps, _ = _add_noise(pipeline, latents, BOTTLENECK_LEVEL, seed)
            _predict(pipeline, noisy, timesteps, pipeline.encode_classes(null))
            features.append(outputs.pop().flatten(1).float().cpu().numpy())
    finally:
        hook.remove()
    return np.concatenate(features)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: ImageSet, batch_size: int = 64) -> torch.Tensor:
    """Reconstructions of the slices by the autoencoder: float32 (N, 1, H, W) in [-1, 1], on the CPU."""
    parts = [torch.empty(0, *images.images.shape[1:])]
    for first in range(0, len(images), batch_size):
        batch = images.floats(slice(first, first + batch_size)).to(vae.device, vae.dtype)
        parts.append(vae.decode(vae.encode(batch).latent_dist.mode()).sample.float().clamp(-1, 1).cpu())
    return torch.cat(parts)


def _latent_batches(
    pipeline: ClassConditionalLDMPipeline, images: ImageSet, batch_size: int, title: str
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Rows (B,) and their normalized latents (B, C, h, w), the means of the posteriors."""
    expected = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if (side := images.images.shape[-1]) != expected:
        raise UserError(f"slices of {side} pixels, but the model generates {expected}; resize the slices")
    vae = pipeline.vae
    for first in tqdm(range(0, len(images), batch_size), desc=title, leave=False):
        rows = np.arange(first, min(first + batch_size, len(images)))
        posterior = vae.encode(images.floats(rows).to(vae.device, vae.dtype)).latent_dist
        yield rows, normalize_latents(vae, posterior.mode())


def _add_noise(
    pipeline: ClassConditionalLDMPipeline, latents: torch.Tensor, level: float, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DDPMScheduler]:
    """Noisy latents and noise (B, C, h, w), timesteps (B,) at `level`, and the scheduler of training."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)  # not every sampler has get_velocity
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every machine
    noise = torch.randn(1, *latents.shape[1:], generator=generator).to(latents).expand_as(latents)
    timestep = int(level * scheduler.config.num_train_timesteps)
    timesteps = torch.full((len(latents),), timestep, device=latents.device)
    return scheduler.add_noise(latents, noise, timesteps), noise, timesteps, scheduler


def _predict(
    pipeline: ClassConditionalLDMPipeline, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The U-Net's prediction for latents (B, C, h, w), float32; computed in bf16 where the hardware does."""
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=has_bf16()):
        return pipeline.unet(noisy.to(pipeline.unet.dtype), timesteps, tokens).sample.float()
