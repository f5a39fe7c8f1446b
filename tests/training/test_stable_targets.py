"""The stable target field: the posterior mean over slices of the class, and its place in the training."""

import pytest
import torch
from diffusers import DDPMScheduler
from stand_ins import make_pipeline

import train_ldm
from adni_ldm.models import build_autoencoder
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.training import stable_targets
from adni_ldm.training.latents import LatentPosteriors
from adni_ldm.training.stable_targets import StableTargets

NULL = 2


@pytest.fixture
def latents():
    """12 latents (4, 2, 2) of two classes, near to each other, without spread of their own."""
    mean = 0.5 * torch.randn(12, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    posteriors = torch.stack([mean, torch.zeros_like(mean)], dim=1)[None]
    return LatentPosteriors(posteriors, torch.arange(12) % 2)


def make_targets(latents, prediction_type="v_prediction"):
    vae = make_pipeline().vae
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = DDPMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    return StableTargets(latents, vae, scheduler, NULL), scheduler


def posterior_mean(noisy, alpha, references):
    """Σ w_j z_j in float64, by the densities themselves."""
    distances = (noisy.double() - alpha.double().sqrt() * references.double()).flatten(1).square().sum(1)
    densities = torch.exp((distances.min() - distances) / (2 * (1 - alpha.double())))
    weights = (densities / densities.sum()).view(-1, 1, 1, 1)
    return (weights * references.double()).sum(0)


@pytest.mark.parametrize("timestep", [30, 300, 700, 999])
def test_the_target_is_the_posterior_mean_over_the_class(latents, timestep):
    """Of a slice, over its class; of the null class, over all; the noise is that of the target."""
    targets, scheduler = make_targets(latents)
    alpha = scheduler.alphas_cumprod[timestep]
    all_of_them = latents.posteriors[0, :, 0]
    indices, labels = torch.tensor([3, 4, 4]), torch.tensor([1, 0, NULL])
    clean = all_of_them[indices]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    at = torch.full((3,), timestep)
    noisy = scheduler.add_noise(clean, noise, at)
    found, found_noise = targets(clean, noisy, at, labels, None, indices)
    for row, label in enumerate(labels):
        members = all_of_them if label == NULL else all_of_them[latents.labels == label]
        expected = posterior_mean(noisy[row], alpha, members)
        assert torch.allclose(found[row].double(), expected, atol=1e-4)
    assert torch.allclose(scheduler.add_noise(found, found_noise, at), noisy, atol=1e-5)
    if timestep == 30:
        assert torch.allclose(found, clean, atol=1e-3), "at little noise the slice itself"


def test_the_target_depends_on_the_noisy_latent_and_not_on_its_slice(latents):
    targets, _ = make_targets(latents)
    indices, labels, at = torch.tensor([1, 5]), torch.tensor([1, 1]), torch.tensor([500, 500])
    noisy = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    one, other = targets(latents.posteriors[0, indices, 0], noisy, at, labels, None, indices)[0]
    assert torch.allclose(one, other, atol=1e-5)


def test_latents_far_from_zero_lose_no_digits(latents):
    """Distances are small differences of sums that are large there."""
    latents.posteriors[0, :, 0] += 30000
    targets, scheduler = make_targets(latents)
    clean, at = latents.posteriors[0, [5], 0], torch.tensor([500])
    noisy = scheduler.add_noise(clean, torch.zeros_like(clean), at)
    found, _ = targets(clean, noisy, at, torch.tensor([1]), None, torch.tensor([5]))
    expected = posterior_mean(noisy[0], scheduler.alphas_cumprod[500], latents.posteriors[0, 1::2, 0])
    assert torch.allclose(found[0].double(), expected, atol=0.01)


def test_a_sampled_latent_takes_the_place_of_its_slice_in_the_mean(latents):
    targets, scheduler = make_targets(latents)
    members = latents.posteriors[0, :, 0].clone()
    members[5] += 0.3
    at, noisy = torch.tensor([500]), torch.zeros(1, 4, 2, 2)
    found, _ = targets(members[5:6], noisy, at, torch.tensor([1]), None, torch.tensor([5]))
    expected = posterior_mean(noisy[0], scheduler.alphas_cumprod[500], members[1::2])
    assert torch.allclose(found[0].double(), expected, atol=1e-5)


def test_where_conditions_are_given_the_target_is_the_slice(latents):
    targets, _ = make_targets(latents)
    indices, at = torch.tensor([1, 3]), torch.tensor([900, 900])
    clean, conditions = latents.posteriors[0, indices, 0], torch.tensor([[torch.nan] * 2, [70.0, torch.nan]])
    found, _ = targets(clean, 0 * clean, at, torch.tensor([1, NULL]), conditions, indices)
    assert torch.allclose(found[1], clean[1]) and not torch.allclose(found[0], clean[0], atol=0.1)


def test_half_precision_does_not_reach_the_weights(latents):
    targets, _ = make_targets(latents)
    indices, at, labels = torch.tensor([1, 3]), torch.tensor([300, 500]), torch.tensor([1, 1])
    clean = latents.posteriors[0, indices, 0]
    noisy = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = targets(clean, noisy, at, labels, None, indices)
    assert torch.equal(found, targets(clean, noisy, at, labels, None, indices)[0])


def test_a_large_set_is_represented_by_every_second_slice_and_the_slice_itself(latents, monkeypatch):
    monkeypatch.setattr(stable_targets, "MOST_REFERENCES", 6)
    targets, scheduler = make_targets(latents)
    clean, at = latents.posteriors[0, [3], 0], torch.tensor([900])
    found, _ = targets(clean, 0 * clean, at, torch.tensor([NULL]), None, torch.tensor([3]))
    chosen = latents.posteriors[0, [0, 2, 3, 4, 6, 8, 10], 0]
    expected = posterior_mean(0 * clean[0], scheduler.alphas_cumprod[900], chosen)
    assert torch.allclose(found[0].double(), expected, atol=1e-5)


def test_train_ldm_trains_towards_them(run, phantom_dir, tmp_path):
    vae = build_autoencoder(16, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(tmp_path / "vae")
    words = ("--vae", tmp_path / "vae", "--data_dir", phantom_dir, "--image_size", 16, "--batch_size", 4)
    words += ("--unet_widths", 32, 64, "--token_dim", 16, "--layers_per_block", 1, "--report_to", "none")
    words += ("--max_steps", 2, "--warmup_steps", 0, "--validation_steps", 0, "--checkpointing_steps", 0)
    words += ("--learning_rate", 1e-3, "--mixed_precision", "no")
    weights = {}
    for stable in ("true", "false"):
        run(train_ldm, *words, "--output_dir", tmp_path / stable, "--stable_targets", stable)
        pipeline = ClassConditionalLDMPipeline.from_pretrained(tmp_path / stable)
        weights[stable] = torch.cat([part.flatten() for part in pipeline.unet.parameters()])
    assert not torch.allclose(weights["true"], weights["false"], atol=1e-5)
