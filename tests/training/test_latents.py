"""The latent set: posterior kept, statistics right, scale and shift applied once."""

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from adni_ldm.models import build_autoencoder
from adni_ldm.pipeline import denormalize_latents, normalize_latents
from adni_ldm.training.latents import LatentPosteriors, encode_posteriors


class Slices(Dataset):
    def __init__(self, count):
        self.images = torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": index % 2}


def test_every_slice_is_encoded_in_order():
    vae = build_autoencoder(16, widths=(16, 32))
    slices = Slices(7)
    latents = encode_posteriors(vae, slices, batch_size=3, accelerator=Accelerator(cpu=True))
    assert torch.allclose(latents.mean, vae.encode(slices.images).latent_dist.mean, atol=1e-5)
    assert latents.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_drawn_latents_keep_the_posteriors_spread():
    latents = LatentPosteriors(torch.ones(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5), torch.zeros(2))
    draws = torch.stack([latents.draw([0, 1], torch.randn(2, 1, 4, 4)) for _ in range(500)])
    assert draws.std(dim=0).mean().item() == pytest.approx(0.5, rel=0.05)


def test_normalized_latents_have_zero_mean_and_unit_variance():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 5.0]).view(1, 3, 1, 1)
    mean = torch.randn(400, 3, 4, 4, generator=generator) * scale + 3
    latents = LatentPosteriors(mean, torch.full_like(mean, 0.2) * scale, torch.zeros(400))
    vae = build_autoencoder(16, latent_channels=3, widths=(16, 32))
    with pytest.raises(ValueError, match="latents_mean"):
        normalize_latents(vae, mean)

    channel_mean, channel_std = latents.channel_statistics()
    vae.register_to_config(latents_mean=channel_mean, latents_std=channel_std)
    drawn = latents.draw(list(range(400)), torch.randn(mean.shape, generator=generator))
    normalized = normalize_latents(vae, drawn)
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (normalized.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert torch.allclose(denormalize_latents(vae, normalized), drawn, atol=1e-5)
