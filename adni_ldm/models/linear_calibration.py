"""The linear calibration of a denoiser: what mean and covariance of the latents add to its prediction.

This file is saved with every pipeline that has one and loaded from there where adni_ldm is not installed, so
it imports nothing of the package. `ModelMixin` must stay a name of this file: diffusers looks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
SCHEDULE += ("trained_betas",)


class LinearCalibration(ModelMixin, ConfigMixin):
    """Least-squares combination of the denoiser and the Wiener filter, by principal component and timestep.

    Of latents z with mean μ and covariance Σ λᵢ uᵢuᵢᵀ, of which x = √ᾱ z + √(1−ᾱ) ε is seen, the denoiser
    estimates the i-th principal component as bᵢ = uᵢᵀ (ẑ − μ), and the Wiener filter as

        oᵢ = √ᾱ λᵢ / (ᾱ λᵢ + 1 − ᾱ) · uᵢᵀ (x − √ᾱ μ),

    which is the best estimate if the latents are Gaussian. After a short training the denoiser's estimates
    of the components are too small, and at high noise worse than the Wiener filter's, which a trained network
    approaches there (Wang & Vastola 2024, arXiv:2412.09726): samples are then too much alike. αᵢ bᵢ + βᵢ oᵢ
    takes their place, with the αᵢ and βᵢ of least squared error on training latents. Class and conditions act
    by the bᵢ alone. What error is left is the posterior variance, from which ancestral sampling draws
    (`posterior_noise`).

    Args:
        shape: (C, h, w) of the latents.
        rank: number of principal components that are calibrated, of largest variance; all others stay the
            denoiser's.
        timesteps: of the α and β, rising; those of timesteps between them are interpolated, and at 0 nothing
            is changed.
        schedule: entries `SCHEDULE` of the training's DDPMScheduler.
        prediction_type: "v_prediction" or "epsilon".
    """

    @register_to_config
    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        timesteps: Sequence[int],
        schedule: Mapping[str, object],
        prediction_type: str = "v_prediction",
    ):
        super().__init__()
        elements = torch.Size(shape).numel()
        self.register_buffer("mean", torch.zeros(elements))
        self.register_buffer("components", torch.zeros(rank, elements))  # orthonormal rows uᵢ
        self.register_buffer("variances", torch.ones(rank))  # λᵢ
        unchanged = torch.tensor([1.0, 0.0]).expand(len(timesteps), rank, 2)
        self.register_buffer("weights", unchanged.clone())  # α and β of each timestep and component
        # Mean squared error of each component's estimate, and of an element of all other directions.
        self.register_buffer("errors", torch.ones(len(timesteps), rank + 1))

    @functools.cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """ᾱ (T,) in float32, which a pipeline in half precision must not round: near 1 it has no digits."""
        return DDPMScheduler(**self.config.schedule).alphas_cumprod

    def coordinates(self, latents: torch.Tensor, signal: float | torch.Tensor = 1.0) -> torch.Tensor:
        """Principal components (B, rank) of latents (B, C·h·w) about `signal` times their mean."""
        return (latents - signal * self.mean.float()) @ self.components.float().T

    def clean_latents(
        self, prediction: torch.Tensor, noisy: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The denoiser's estimate ẑ (B, C·h·w) of the clean latents.

        Prediction and noisy latents as in `forward`, with the `rates` of their timesteps.
        """
        noisy, prediction = noisy.float().flatten(1), prediction.float().flatten(1)
        if self.config.prediction_type == "v_prediction":
            return signal * noisy - noise * prediction
        return (noisy - noise * prediction) / signal

    def wiener(self, noisy: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The Wiener filter's estimates oᵢ (B, rank) from noisy latents of those `rates`."""
        variances = self.variances.float()
        gain = signal * variances / (signal**2 * variances + noise**2)
        return gain * self.coordinates(noisy.float().flatten(1), signal)

    def forward(self, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The calibrated prediction, ε or v (B, C, h, w) in float32.

        Of the denoiser's `prediction` for `noisy` latents (B, C, h, w), of the variance that they have in
        training, and `timesteps` (B,) or one of all.
        """
        with torch.autocast(noisy.device.type, enabled=False):
            signal, noise = self.rates(timesteps)
            own = self.coordinates(self.clean_latents(prediction, noisy, signal, noise))
            filtered = self.wiener(noisy, signal, noise)
            alpha, beta = self._at(timesteps, self.weights, (1.0, 0.0)).unbind(-1)
            change = ((alpha - 1) * own + beta * filtered) @ self.components.float()  # of the clean latents
            scale = -1 / noise if self.config.prediction_type == "v_prediction" else -signal / noise
            return prediction.float() + (scale * change).view_as(prediction)

    def posterior_noise(self, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """Noise as the posterior of the clean latents at a timestep has it, of white noise (B, C, h, w).

        In units of √(1−ᾱ), which is the posterior's standard deviation where latents have unit variance.
        """
        with torch.autocast(noise.device.type, enabled=False):
            scale = self._at(timestep, self.errors, 0.0).sqrt() / self.rates(timestep)[1]  # (1, rank + 1)
            components, rest = scale.split([self.config.rank, 1], dim=1)
            white = noise.float().flatten(1)
            change = ((components - rest) * (white @ self.components.float().T)) @ self.components.float()
            return (rest * white + change).view_as(noise).to(noise.dtype)

    def rates(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ and √(1−ᾱ) of timesteps, (B, 1), or (1, 1) of one."""
        places = torch.as_tensor(timesteps).round().long().reshape(-1).cpu()
        alphas = self.alphas_cumprod[places].to(self.mean.device)[:, None]
        return alphas.sqrt(), (1 - alphas).sqrt()

    def _at(
        self, timesteps: int | torch.Tensor, table: torch.Tensor, first: float | tuple[float, ...]
    ) -> torch.Tensor:
        """Rows (B or 1, …) of a table of `timesteps`, interpolated; `first` fills that of timestep 0."""
        knots = torch.tensor([0, *self.config.timesteps], dtype=torch.float32)
        places = torch.as_tensor(timesteps, dtype=torch.float32).reshape(-1).cpu()
        upper = torch.searchsorted(knots, places).clamp(1, len(knots) - 1)  # (B,)
        share = ((places - knots[upper - 1]) / (knots[upper] - knots[upper - 1])).clamp(0, 1)
        rows = torch.cat([torch.tensor(first, device=table.device).expand_as(table[:1]), table.float()])
        share = share.to(table.device).view(-1, *[1] * (table.ndim - 1))
        return torch.lerp(rows[upper - 1], rows[upper], share)
