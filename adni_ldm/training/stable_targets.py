"""Targets of the denoiser that are means over many slices: the stable target field."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from adni_ldm.pipeline import normalize_latents
from adni_ldm.training.latents import LatentPosteriors

MOST_REFERENCES = 4096  # slices that a target is a mean of


class StableTargets:
    """The stable target field (Xu et al. 2023, arXiv:2302.00670, equation 6).

    A noisy latent x = √ᾱ z + √(1−ᾱ) ε of one slice could be of many others too, so its z is a noisy target.
    The mean over training slices z_j of the class,

        Σ_j w_j z_j,    w_j ∝ exp(−|x − √ᾱ z_j|² / 2(1−ᾱ)),

    has the same expectation given x, which is what the denoiser learns, and less variance. Of the null class
    it is the mean over all slices; where conditions are given, and where noise is little, the z of the slice.

    Args:
        latents: of the training slices. More than `MOST_REFERENCES` are represented by every n-th of them,
            beside the slice itself.
        null_label: label of the null class.
    """

    def __init__(
        self, latents: LatentPosteriors, vae: AutoencoderKL, scheduler: DDPMScheduler, null_label: int
    ):
        count, device = len(latents), latents.labels.device
        chosen = torch.arange(0, count, -(-count // MOST_REFERENCES))
        self.indices, self.labels = chosen.to(device), latents.labels[chosen.to(device)]
        rows = latents.posteriors[0, chosen.to(latents.posteriors.device), 0].to(device)
        self.references = normalize_latents(vae, rows).flatten(1).double()  # (N, C·h·w)
        self.norms = self.references.square().sum(1)  # (N,)
        self.alphas, self.null_label = scheduler.alphas_cumprod.double().to(device), null_label

    @torch.no_grad()
    def __call__(
        self,
        clean: torch.Tensor,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        conditions: torch.Tensor | None,
        indices: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets for the clean latents and the noise, both (B, C, h, w), of the slices `indices` (B,).

        Clean and noisy latents (B, C, h, w), timesteps and labels (B,), conditions (B, K) with NaN where they
        are not given to the denoiser.
        """
        # In float64, which neither autocast nor TF32 rounds: distances are small differences of large sums.
        alphas = self.alphas[timesteps][:, None]
        signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
        own, seen = clean.double().flatten(1), noisy.double().flatten(1)  # (B, C·h·w)
        # log w_j without |x|², which all have; the slice itself by its sampled latent, in the last place
        others = signal * seen @ self.references.T - alphas / 2 * self.norms
        itself = signal[:, 0] * (seen * own).sum(1) - alphas[:, 0] / 2 * own.square().sum(1)
        wrong = (self.labels != labels[:, None]) & (labels != self.null_label)[:, None]
        wrong |= self.indices == indices.to(self.indices.device)[:, None]
        if conditions is not None:
            wrong |= ~conditions.isnan().all(1, keepdim=True)
        weights = torch.cat([others.masked_fill(wrong, -torch.inf), itself[:, None]], dim=1) / noise**2
        weights = weights.softmax(dim=1)
        target = weights[:, :-1] @ self.references + weights[:, -1:] * own
        targets = target, (seen - signal * target) / noise
        return tuple(one.view_as(clean).to(clean.dtype) for one in targets)
