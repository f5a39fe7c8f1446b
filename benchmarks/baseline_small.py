"""A reimplementation of a small published baseline on these slices; see baselines.py for its definition."""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from baseline_training import Trained, batches, half_precision
from measure import DEVICE
from torch import nn

from adni_ldm.evaluation.image_sets import ImageSet

LATENT, STEPS, BATCH, RATE = 128, 10, 32, 1e-3


class SmallVAE(nn.Module):
    """Slices (B, 1, S, S) to one vector of 128 numbers, and back through a feature map (B, 128, S/8, S/8)."""

    def __init__(self, image_size: int):
        super().__init__()
        self.side = image_size // 8
        size = LATENT * self.side**2
        stride = {"kernel_size": 4, "stride": 2, "padding": 1}
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, **stride), nn.ReLU(), nn.Conv2d(32, 64, **stride), nn.ReLU()),
            *(nn.Conv2d(64, LATENT, **stride), nn.ReLU(), nn.Flatten()),
        )
        self.mean, self.logvar = nn.Linear(size, LATENT), nn.Linear(size, LATENT)
        self.expand = nn.Linear(LATENT, size)
        self.decoder = nn.Sequential(
            *(nn.ConvTranspose2d(LATENT, 64, **stride), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, **stride), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 1, **stride), nn.Tanh()),
        )

    def to_map(self, vector: torch.Tensor) -> torch.Tensor:
        return self.expand(vector).view(-1, LATENT, self.side, self.side)

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.encoder(images)
        return self.mean(hidden), self.logvar(hidden)


class SmallUNet(nn.Module):
    """U-Net with BatchNorm on the map (B, 128, s, s); the step enters first, the class at the bottleneck."""

    def __init__(self, width: int = 128):
        super().__init__()

        def block(into: int, out: int, stride: int = 1) -> nn.Sequential:
            first = nn.Conv2d(into, out, 3, stride, 1)
            return nn.Sequential(
                *(first, nn.BatchNorm2d(out), nn.ReLU()),
                *(nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()),
            )

        self.time = nn.Linear(32, LATENT)
        self.label = nn.Embedding(2, 4 * width)
        self.down1, self.down2 = block(LATENT, width), block(width, 2 * width, 2)
        self.down3, self.middle = block(2 * width, 4 * width, 2), block(4 * width, 4 * width)
        self.up3, self.up2 = block(4 * width, 2 * width), block(2 * width, width)
        self.last = nn.Conv2d(width, LATENT, 3, padding=1)

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(16, device=noisy.device) / 16)
        angles = steps[:, None] * frequencies
        time_code = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, :, None, None]
        one = self.down1(noisy + time_code)
        two = self.down2(one)
        middle = self.middle(self.down3(two) + self.label(labels)[:, :, None, None])
        up = self.up3(F.interpolate(middle, size=two.shape[-2:])) + two
        return self.last(self.up2(F.interpolate(up, size=one.shape[-2:])) + one)


def train_small(train: ImageSet, seconds: float) -> Trained:
    """Train the VAE, then the U-Net, each for half the time, by AdamW with a cosine learning-rate decay."""
    started = time.perf_counter()
    vae = SmallVAE(train.images.shape[-1]).to(DEVICE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=RATE)
    vae_steps = 0
    for images, _, elapsed in batches(train, BATCH, seconds / 2):
        set_rate(optimizer, elapsed)
        with half_precision():
            mean, logvar = vae.encode(images)
            mean, logvar = mean.float(), logvar.float()
            vector = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            reconstruction = vae.decoder(vae.to_map(vector))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum()
        loss = 0.5 * F.mse_loss(reconstruction.float(), images, reduction="sum") + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        vae_steps += 1
    vae.requires_grad_(False)

    betas = torch.linspace(1e-4, 0.1, STEPS, device=DEVICE)
    kept = torch.cumprod(1 - betas, dim=0)  # ᾱ
    unet = SmallUNet().to(DEVICE)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE)
    ldm_steps = 0
    for images, labels, elapsed in batches(train, BATCH, seconds - (time.perf_counter() - started)):
        set_rate(optimizer, elapsed)
        with half_precision():
            mean, logvar = vae.encode(images)
            clean = vae.to_map(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
            steps = torch.randint(STEPS, (len(images),), device=DEVICE)
            noise = torch.randn_like(clean)
            share = kept[steps].view(-1, 1, 1, 1)
            prediction = unet(share.sqrt() * clean + (1 - share).sqrt() * noise, steps, labels)
        loss = F.mse_loss(prediction.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ldm_steps += 1
    unet.eval()

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return vae.decoder(vae.to_map(vae.encode(images)[0]))

    @torch.no_grad()
    def sample(labels: torch.Tensor) -> torch.Tensor:
        labels = labels.to(DEVICE)
        maps = vae.to_map(torch.randn(len(labels), LATENT, device=DEVICE))
        for step in reversed(range(STEPS)):  # DDPM (Ho et al. 2020, algorithm 2)
            with half_precision():
                noise = unet(maps, torch.full_like(labels, step), labels).float()
            maps = (maps - betas[step] / (1 - kept[step]).sqrt() * noise) / (1 - betas[step]).sqrt()
            if step:
                variance = betas[step] * (1 - kept[step - 1]) / (1 - kept[step])
                maps = maps + variance.sqrt() * torch.randn_like(maps)
        return vae.decoder(maps).cpu()

    return Trained(reconstruct, sample, time.perf_counter() - started, f"{vae_steps} + {ldm_steps} steps")


def set_rate(optimizer: torch.optim.Optimizer, elapsed: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * elapsed))
