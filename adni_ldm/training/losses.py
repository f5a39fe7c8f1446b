"""Losses, each a function of tensors, computed in float32."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr


def reconstruction_loss(reconstruction: torch.Tensor, images: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean absolute ("l1") or squared ("l2") difference of slices (B, 1, H, W) in [-1, 1]."""
    distance = {"l1": F.l1_loss, "l2": F.mse_loss}[kind]
    return distance(reconstruction.float(), images.float())


def spectral_loss(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of the amplitudes of the frequencies of slices (B, 1, H, W) in [-1, 1].

    Dhariwal et al. 2020 (Jukebox, arXiv:2005.00341), section 3.3: a reconstruction that is too smooth lacks
    amplitude wherever its edges are. The value of MONAI's JukeboxLoss, whose gradient is NaN where a
    frequency has no amplitude, as in an image with a uniform border; that of `abs` is 0 there.
    """
    found, expected = (
        torch.fft.fft2(slices.float(), norm="ortho").abs() for slices in (reconstruction, images)
    )
    return F.mse_loss(found, expected)


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) in nats, mean over the latent's elements (B, C, h, w).

    ½ (μ² + σ² − 1 − log σ²), Kingma & Welling 2014 (arXiv:1312.6114), appendix B.
    """
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()


def diffusion_target(
    clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, scheduler: DDPMScheduler
) -> torch.Tensor:
    """The target of the denoiser: the noise ε, or v = √ᾱ ε − √(1−ᾱ) x (Salimans & Ho 2022,
    arXiv:2202.00512, appendix D). All tensors (B, C, h, w), timesteps (B,)."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    raise ValueError(f"prediction_type {scheduler.config.prediction_type!r} must be epsilon or v_prediction")


def diffusion_loss(
    prediction: torch.Tensor,
    clean: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: DDPMScheduler,
    snr_gamma: float = 0.0,
) -> torch.Tensor:
    """Squared error of the prediction (B, C, h, w), weighted by timestep when `snr_gamma` > 0.

    min-SNR-γ (Hang et al. 2023, arXiv:2303.09556, equation 5): min(SNR, γ) / SNR for ε, and
    min(SNR, γ) / (SNR + 1) for v. Both are finite at zero terminal SNR, where ε's 0 / 0 is 1, its limit.
    """
    target = diffusion_target(clean, noise, timesteps, scheduler)
    error = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if snr_gamma > 0:
        snr = compute_snr(scheduler, timesteps)  # (B,)
        if scheduler.config.prediction_type == "epsilon":
            error = error * (snr_gamma / snr).clamp(max=1)
        else:
            error = error * snr.clamp(max=snr_gamma) / (snr + 1)
    return error.mean()
