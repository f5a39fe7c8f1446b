"""MONAI's latent diffusion model, trained as in its 2-D tutorial; see baselines.py for the differences."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from baseline_training import Trained, batches, half_precision, in_half
from measure import DEVICE, Preset
from monai.inferers import LatentDiffusionInferer
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
from monai.networks.schedulers import DDPMScheduler
from monai.transforms import RandAffine
from torch import nn

from adni_ldm.evaluation.image_sets import ImageSet

KL_WEIGHT, ADVERSARIAL_WEIGHT, WARM_UP = 1e-6, 0.01, 0.1
TOKEN = 64  # width of the class token


def train_monai(
    train: ImageSet, seconds: float, preset: Preset, tutorial: bool, sampling_steps: int = 1000
) -> Trained:
    """Train the autoencoder, then the U-Net, each for half the time, on slices in [0, 1] as in the tutorial.

    Args:
        tutorial: take its learning rates, batch size, blocks and augmentation, else the preset's and none.
    """
    started = time.perf_counter()
    own = tutorial and preset.name == "adni"  # the tutorial's own widths on a GPU
    autoencoder, scheduler = build_autoencoder(preset, own, 2 if tutorial else 1), build_scheduler()
    augment = build_augmentation(preset.image_size) if tutorial else lambda images: images
    rates = (1e-4, 1e-4) if tutorial else (learning_rate(preset.vae), learning_rate(preset.ldm))
    sizes = (64, 64) if tutorial else (preset.vae["batch_size"], preset.ldm["batch_size"])

    # ---- Autoencoder ---------------------------------------------------------------------------------------
    discriminator = PatchDiscriminator(2, channels=64, in_channels=1, num_layers_d=3).to(DEVICE)
    adversarial = PatchAdversarialLoss(criterion="least_squares")
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=rates[0])
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=5e-4)
    vae_steps = 0
    for images, _, elapsed in batches(train, sizes[0], seconds / 2):
        images = augment(images / 2 + 0.5)
        optimizer.zero_grad()
        with half_precision():
            reconstruction, mean, sigma = autoencoder(images)
            logits = discriminator(reconstruction)[-1] if elapsed > WARM_UP else None
        mean, sigma = mean.float(), sigma.float()
        kl = 0.5 * (mean.square() + sigma.square() - sigma.square().log() - 1).sum(dim=(1, 2, 3)).mean()
        loss = F.l1_loss(reconstruction.float(), images) + KL_WEIGHT * kl
        if logits is not None:
            loss = loss + ADVERSARIAL_WEIGHT * adversarial(logits.float(), True, for_discriminator=False)
        loss.backward()
        optimizer.step()
        if logits is not None:
            optimizer_d.zero_grad()
            with half_precision():
                fake = discriminator(reconstruction.detach().contiguous())[-1]
                real = discriminator(images)[-1]
            loss = adversarial(fake.float(), False, True) + adversarial(real.float(), True, True)
            (ADVERSARIAL_WEIGHT * loss / 2).backward()
            optimizer_d.step()
        vae_steps += 1

    # ---- U-Net ---------------------------------------------------------------------------------------------
    # Only networks compute in half precision: the scheduler takes the latents' dtype; bfloat16 rounds ᾱ to 1.
    autoencoder.eval()
    autoencoder.encode_stage_2_inputs = in_half(autoencoder.encode_stage_2_inputs)
    first = train.floats(range(min(64, len(train)))).to(DEVICE) / 2 + 0.5
    with torch.no_grad():
        latents = autoencoder.encode_stage_2_inputs(first)
    inferer = LatentDiffusionInferer(scheduler, scale_factor=1 / latents.std())
    unet, embedding = build_unet(preset, own, 2 if tutorial else 1), nn.Embedding(2, TOKEN).to(DEVICE)
    unet.forward = in_half(unet.forward)
    optimizer = torch.optim.Adam([*unet.parameters(), *embedding.parameters()], lr=rates[1])
    ldm_steps = 0
    for images, labels, _ in batches(train, sizes[1], seconds - (time.perf_counter() - started)):
        images = augment(images / 2 + 0.5)
        noise = torch.randn(len(images), *latents.shape[1:], device=DEVICE)
        timesteps = torch.randint(1000, (len(images),), device=DEVICE)
        tokens = embedding(labels)[:, None]
        prediction = inferer(images, autoencoder, unet, noise, timesteps, condition=tokens)
        loss = F.mse_loss(prediction, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ldm_steps += 1
    unet.eval()

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return autoencoder.reconstruct(images / 2 + 0.5) * 2 - 1

    @torch.no_grad()
    def sample(labels: torch.Tensor) -> torch.Tensor:
        scheduler.set_timesteps(sampling_steps)
        noise = torch.randn(len(labels), *latents.shape[1:], device=DEVICE)
        tokens = embedding(labels.to(DEVICE))[:, None]
        images = inferer.sample(noise, autoencoder, unet, scheduler, conditioning=tokens, verbose=False)
        return images.cpu() * 2 - 1

    return Trained(reconstruct, sample, time.perf_counter() - started, f"{vae_steps} + {ldm_steps} steps")


def learning_rate(recipe: dict) -> float:
    """That of the recipe, or where it is Muon's, that of AdamW for small networks."""
    return 1e-3 if recipe.get("optimizer") == "muon" else recipe["learning_rate"]


def build_autoencoder(preset: Preset, own: bool, blocks: int) -> AutoencoderKL:
    widths = (128, 128, 256) if own else preset.widths_by_pixels
    return AutoencoderKL(
        spatial_dims=2,
        channels=widths,
        latent_channels=3,
        num_res_blocks=blocks,
        norm_num_groups=min(32, *widths),
        attention_levels=(False,) * len(widths),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    ).to(DEVICE)


def build_unet(preset: Preset, own: bool, blocks: int) -> DiffusionModelUNet:
    widths = (128, 256, 512) if own else tuple(preset.ldm["unet_widths"])
    return DiffusionModelUNet(
        spatial_dims=2,
        in_channels=3,
        out_channels=3,
        num_res_blocks=blocks,
        channels=widths,
        attention_levels=(False,) + (True,) * (len(widths) - 1),
        num_head_channels=(0, *widths[1:]),
        with_conditioning=True,
        cross_attention_dim=TOKEN,
    ).to(DEVICE)


def build_scheduler() -> DDPMScheduler:
    """The tutorial's, except for clipping at ±4 instead of ±1, which latents of unit variance exceed."""
    limits = {"clip_sample_min": -4, "clip_sample_max": 4}
    return DDPMScheduler(1000, schedule="linear_beta", beta_start=0.0015, beta_end=0.0195, **limits)


def build_augmentation(image_size: int):
    """With probability 1/2: rotation by up to 5 degrees, shift by up to a pixel, scaling by up to 5 %."""
    affine = RandAffine(
        prob=0.5,
        rotate_range=[(-np.pi / 36, np.pi / 36)],
        translate_range=[(-1, 1), (-1, 1)],
        scale_range=[(-0.05, 0.05), (-0.05, 0.05)],
        spatial_size=(image_size, image_size),
        padding_mode="zeros",
    )
    return lambda images: torch.stack([affine(image).as_tensor() for image in images])
