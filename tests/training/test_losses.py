"""Losses against values computed by hand."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from adni_ldm.training.losses import (
    diffusion_loss,
    diffusion_target,
    kl_divergence,
    reconstruction_loss,
    spectral_loss,
)


def make_scheduler(prediction_type="v_prediction", zero_snr=False):
    return DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr
    )


def test_kl_of_a_gaussian_by_hand():
    mean, logvar = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, math.log(4.0)]])
    expected = 0.5 * ((1 + 1 - 1 - 0) + (0 + 4 - 1 - math.log(4.0))) / 2
    assert kl_divergence(mean, logvar).item() == pytest.approx(expected)
    assert kl_divergence(torch.zeros(2), torch.zeros(2)).item() == 0


@pytest.mark.parametrize(("kind", "expected"), [("l1", 0.5), ("l2", 0.25)])
def test_reconstruction_distance(kind, expected):
    assert (
        reconstruction_loss(torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, 1, 2, 2), kind).item() == expected
    )


def test_noise_and_velocity_recover_the_clean_latent():
    """x = √ᾱ x_t − √(1−ᾱ) v, and x_t = √ᾱ x + √(1−ᾱ) ε."""
    scheduler = make_scheduler()
    clean, noise = torch.randn(3, 4, 2, 2, dtype=torch.float64), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    timesteps = torch.tensor([0, 500, 999])
    alpha = scheduler.alphas_cumprod[timesteps].double().view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    velocity = diffusion_target(clean, noise, timesteps, scheduler)
    assert torch.allclose(alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity, clean, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_caps_the_weight_of_easy_timesteps(prediction_type):
    scheduler = make_scheduler(prediction_type)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for timestep in (10, 300, 900):
        timesteps = torch.tensor([timestep])
        alpha = scheduler.alphas_cumprod[timestep]
        snr = (alpha / (1 - alpha)).item()
        args = (torch.zeros_like(clean), clean, noise, timesteps, scheduler)
        ratio = (diffusion_loss(*args, snr_gamma=5.0) / diffusion_loss(*args)).item()
        by_hand = min(snr, 5.0) / (snr if prediction_type == "epsilon" else snr + 1)
        assert ratio == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_is_finite_at_zero_terminal_snr(prediction_type):
    """min(SNR, γ) / SNR is 0 / 0 there for ε; its limit is 1. For v the weight is 0 / 1."""
    scheduler = make_scheduler(prediction_type, zero_snr=True)
    prediction = torch.zeros(1, 4, 8, 8, requires_grad=True)
    loss = diffusion_loss(
        prediction,
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 4, 8, 8),
        torch.tensor([999]),
        scheduler,
        snr_gamma=5.0,
    )
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all()


def test_spectral_loss_is_monais_and_has_a_gradient_where_that_has_none():
    """An image with a uniform border has frequencies of zero amplitude, where the root has no derivative."""
    from monai.losses.spectral_loss import JukeboxLoss

    images = torch.rand(2, 1, 16, 16) * 2 - 1
    reconstruction = torch.rand(2, 1, 16, 16) * 2 - 1
    expected = JukeboxLoss(spatial_dims=2)(reconstruction, images).item()
    assert spectral_loss(reconstruction, images).item() == pytest.approx(expected, rel=1e-5)
    even = torch.full_like(images, -1.0).requires_grad_()
    spectral_loss(even, images).backward()
    assert even.grad.isfinite().all() and even.grad.abs().sum() > 0


def test_losses_are_float32_whatever_comes_in():
    half = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)  # 300² overflows float16
    assert reconstruction_loss(half, torch.zeros_like(half), "l2").item() == 90_000
