"""The linear calibration of a trained denoiser, fitted in closed form to its training latents."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from diffusers import DDPMScheduler

from adni_ldm.models.linear_calibration import SCHEDULE, LinearCalibration
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.training.latents import LatentPosteriors

FEWEST_SUBJECTS = 64  # of fewer, components are those of single subjects, and their weights are chance
MOST_SLICES = 4096  # that mean and covariance are computed of
SLICES_PER_COMPONENT, SUBJECTS_PER_COMPONENT = 16, 2  # at least
MOST_COMPONENTS = 128
FITTED = 256  # slices on which denoiser and Wiener filter are compared; of a quarter of the subjects
BATCH = 32
LEVELS = (0.05, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.97, 1.0)  # timesteps, as fractions of the schedule
RIDGE = 4.0  # subjects: α and β are (1, 0) ± ½ a priori, and errors at most the component's variance


@torch.no_grad()
def calibrate(pipeline: ClassConditionalLDMPipeline, latents: LatentPosteriors, seed: int) -> None:
    """Fit a calibration of the pipeline's denoiser, which has none yet, and add it, in place.

    In float32, whatever autocast is on: half precision has too few digits for a covariance. Where a number
    is not finite, the pipeline stays without a calibration, and a warning says so.
    """
    with torch.autocast(pipeline.unet.device.type, enabled=False):
        calibration = fit_calibration(pipeline, latents, seed)
    if calibration and not all(values.isfinite().all() for values in calibration.buffers()):
        warnings.warn("no linear calibration: latents or predictions are not finite", stacklevel=2)
        calibration = None
    pipeline.register_modules(linear_calibration=calibration)


def fit_calibration(
    pipeline: ClassConditionalLDMPipeline, latents: LatentPosteriors, seed: int
) -> LinearCalibration | None:
    """The `LinearCalibration` of a denoiser, which is used as it is, without one.

    Mean and covariance are those of sampled training latents. At each of LEVELS the denoiser predicts FITTED
    latents of other subjects with their class and conditions, and the weights of both estimates are those of
    least squared error. On the same latents, components that are chance would seem to be known.

    None where there are fewer than FEWEST_SUBJECTS.
    """
    unet, scheduler = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    steps, elements = scheduler.config.num_train_timesteps, latents.posteriors[0, 0, 0].numel()
    subjects = np.arange(len(latents)) if latents.subjects is None else latents.subjects
    names, numbers = np.unique(subjects, return_inverse=True)
    if min(steps, elements) < 2 or len(names) < FEWEST_SUBJECTS:
        return None
    generator = torch.Generator().manual_seed(seed)
    apart = torch.randperm(len(names), generator=generator)[torch.from_numpy(numbers)] < len(names) // 4
    order = torch.randperm(len(latents), generator=generator)
    fitted, others = order[apart[order]][:FITTED], order[~apart[order]][:MOST_SLICES]
    rank = len(np.unique(numbers[others])) // SUBJECTS_PER_COMPONENT
    rank = min(MOST_COMPONENTS, rank, max(1, len(others) // SLICES_PER_COMPONENT), elements - 1)
    timesteps = sorted({max(1, round(level * steps) - 1) for level in LEVELS})
    schedule = {name: scheduler.config.get(name) for name in SCHEDULE}
    options = (timesteps, schedule, scheduler.config.prediction_type)
    shape = tuple(latents.posteriors.shape[3:])
    calibration = LinearCalibration(shape, rank, *options).to(unet.device)
    fit_distribution(calibration, _sample(pipeline, latents, others, generator).flatten(1))

    batch, clean = latents[fitted.tolist()], _sample(pipeline, latents, fitted, generator)  # (n, C, h, w)
    tokens = pipeline.encode_classes(batch.labels, batch.conditions)  # (n, T, D)
    truth = calibration.coordinates(clean.flatten(1))  # (n, rank)
    ridge = RIDGE * len(fitted) / len(np.unique(numbers[fitted]))  # slices of a subject are alike
    for number, timestep in enumerate(timesteps):
        estimates, missed = [], []
        for part, read in zip(clean.split(BATCH), tokens.split(BATCH)):
            at = torch.full((len(part),), timestep, device=part.device)
            noisy = scheduler.add_noise(part, _normal(part.shape, generator, part), at)
            prediction = unet(noisy, at, encoder_hidden_states=read, return_dict=False)[0]
            rates = calibration.rates(at)
            found = calibration.clean_latents(prediction, noisy, *rates)
            missed.append((part.flatten(1) - found).square().sum(1))  # (B,)
            estimates.append((calibration.coordinates(found), calibration.wiener(noisy, *rates)))
        own, filtered = map(torch.cat, zip(*estimates))
        weights = least_squares(own, filtered, truth, calibration.variances, ridge)
        others = torch.cat(missed) - (truth - own).square().sum(1)
        errors = (truth - weights[:, 0] * own - weights[:, 1] * filtered).square().mean(0)
        calibration.weights[number] = weights
        calibration.errors[number] = torch.cat([errors, others.mean(0, keepdim=True) / (elements - rank)])
    return calibration


def fit_distribution(calibration: LinearCalibration, latents: torch.Tensor) -> None:
    """Set mean, principal components and variances to those of latents (N, C·h·w), in place: NaN, if any is.

    The SVD is randomized (Halko et al. 2011, arXiv:0909.4061), with a fixed seed.
    """
    mean, rank = latents.mean(0), calibration.config.rank
    if not latents.isfinite().all():
        calibration.variances.fill_(torch.nan)
        return
    about = latents - mean  # (N, C·h·w)
    with torch.random.fork_rng(devices=[latents.device] if latents.is_cuda else []):
        torch.manual_seed(0)
        _, values, components = torch.svd_lowrank(about, min(rank + 8, *about.shape), niter=4)
    calibration.mean.copy_(mean)
    calibration.components.copy_(components.T[:rank])
    calibration.variances.copy_(values[:rank].square() / len(about))


def least_squares(
    own: torch.Tensor, filtered: torch.Tensor, truth: torch.Tensor, variances: torch.Tensor, ridge: float
) -> torch.Tensor:
    """α and β (rank, 2) of least squared error of α own + β filtered, components (n, rank) of `variances`.

    A component is fitted together with those whose place differs by at most a tenth, each with the same say:
    their weights are alike, and chance is averaged. `ridge` draws them to (1, 0), the denoiser as it is:
    where slices are few, both estimates are alike, or one is 0 because nothing but noise is seen.
    """
    both = torch.stack([own, filtered], dim=-1).double()  # (n, rank, 2)
    products = torch.einsum("nri,nrj->rij", both, both)
    missing = torch.einsum("nri,nr->ri", both, (truth - own).double())[..., None]
    systems = torch.cat([products, missing], dim=-1) / variances.double().clamp(min=1e-12)[:, None, None]
    near = [systems[place - place // 10 : place + place // 10 + 1].sum(0) for place in range(len(systems))]
    products, missing = torch.stack(near).split([2, 1], dim=-1)  # (rank, 2, 2) and (rank, 2, 1)
    unchanged, identity = torch.tensor([1.0, 0.0]).to(products), torch.eye(2).to(products)
    return (unchanged + torch.linalg.solve(products + ridge * identity, missing)[..., 0]).float()


def _sample(
    pipeline: ClassConditionalLDMPipeline,
    latents: LatentPosteriors,
    rows: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Normalized latents (n, C, h, w) of the slices `rows`, on the U-Net's device."""
    rows = rows.to(latents.posteriors.device)
    mean, std = latents.posteriors[0, rows].to(pipeline.unet.device).unbind(1)
    return normalize_latents(pipeline.vae, mean + std * _normal(mean.shape, generator, mean))


def _normal(shape: torch.Size, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(like)
