"""The linear calibration of a training: fitted to its latents, resumed exactly, left out of a LoRA."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from stand_ins import make_pipeline

import train_ldm
from adni_ldm.generation import hash_pipeline
from adni_ldm.models import build_autoencoder
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.training import calibration
from adni_ldm.training.calibration import calibrate, least_squares
from adni_ldm.training.latents import LatentPosteriors

COMMON = ("--image_size", 16, "--batch_size", 4, "--warmup_steps", 0, "--mixed_precision", "no")
COMMON += ("--report_to", "none", "--validation_steps", 0)
SHAPE = ("--unet_widths", 32, 64, "--token_dim", 16, "--layers_per_block", 1)
STILL = ("--max_steps", 1, "--learning_rate", 1e-12, "--checkpointing_steps", 0)


def load(folder):
    return ClassConditionalLDMPipeline.from_pretrained(folder)


def make_latents(count, seed=0):
    """Posteriors of latents (4, 8, 8) of two classes, with three strong components."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(256, 3, generator=torch.Generator().manual_seed(7))).Q
    labels = torch.arange(count) % 2
    factors = torch.randn(count, 3, generator=generator) * torch.tensor([8.0, 5.0, 3.0])
    mean = torch.linspace(-1, 1, 256) + factors @ directions.T
    mean = mean + 0.2 * torch.randn(count, 256, generator=generator)
    posteriors = torch.stack([mean, torch.full_like(mean, 0.1)], dim=1).view(1, count, 2, 4, 8, 8)
    return LatentPosteriors(posteriors, labels), directions


def squared_error(pipeline, latents, timestep, calibration):
    """Of v, on other slices and other noise than it was fitted with."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clean = latents.posteriors[0, :, 0]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    at = torch.full((len(clean),), timestep)
    noisy = scheduler.add_noise(clean, noise, at)
    pipeline.register_modules(linear_calibration=calibration)
    with torch.no_grad():
        found = pipeline._predict(noisy, at, pipeline.encode_classes(latents.labels), 1)
    return (found - scheduler.get_velocity(clean, noise, at)).square().mean().item()


def test_it_lowers_the_error_of_the_denoiser_on_other_latents():
    pipeline = make_pipeline()
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    latents, directions = make_latents(600)
    others, _ = make_latents(100, seed=1)
    calibrate(pipeline, latents, seed=0)
    calibration = pipeline.linear_calibration
    for timestep in (399, 699, 899):  # of which it has weights
        before = squared_error(pipeline, others, timestep, None)
        assert squared_error(pipeline, others, timestep, calibration) < 0.9 * before, timestep

    # Its components are the strong ones.
    assert (calibration.components[:3] @ directions).abs().diagonal() == pytest.approx([1, 1, 1], abs=0.02)
    assert calibration.variances[:3].sqrt() == pytest.approx([8, 5, 3], rel=0.1)
    # Its errors are those of its estimates, there and in all other directions.
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    clean = others.posteriors[0, :, 0]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    for place, timestep in ((2, 399), (6, 899)):
        at = torch.full((len(clean),), timestep)
        noisy = scheduler.add_noise(clean, noise, at)
        with torch.no_grad():
            prediction = pipeline._predict(noisy, at, pipeline.encode_classes(others.labels), 1)
        found = calibration.clean_latents(prediction, noisy, *calibration.rates(at)) - clean.flatten(1)
        of_components = (found @ calibration.components.T).square()
        rest = (found.square().sum(1) - of_components.sum(1)) / (256 - calibration.config.rank)
        expected = [*of_components.mean(0)[:3].tolist(), rest.mean().item()]
        assert calibration.errors[place, [0, 1, 2, -1]].tolist() == pytest.approx(expected, rel=0.6)

    # The others are chance, less of which is in the latents that the weights are fitted to.
    assert calibration.weights[2, 5:, 1].mean() < 0.8


def test_weights_are_the_least_squares_solution_of_each_component():
    """Against numpy's; in the first ten places a component is alone."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(400, 8, generator=generator)
    own, filtered = (truth + 0.5 * torch.randn(truth.shape, generator=generator) for _ in range(2))
    own = own * torch.linspace(0.2, 0.9, 8)
    little = torch.full((8,), 1e-3)  # beside which the prior of (1, 0) has no weight
    found = least_squares(own, filtered, truth, little, 4.0)
    for place, weights in enumerate(found):
        both = np.stack([part[:, place].numpy() for part in (own, filtered)], axis=1)
        expected = np.linalg.lstsq(both, truth[:, place].numpy(), rcond=None)[0]
        assert weights.numpy() == pytest.approx(expected, rel=0.02)
    as_it_is = torch.tensor([1.0, 0.0]).expand(8, 2)
    nothing = least_squares(own, torch.zeros_like(own), own, torch.ones(8), 4.0)
    assert torch.allclose(nothing, as_it_is), "the denoiser as it is"
    few = least_squares(own[:2], filtered[:2], truth[:2], torch.ones(8), 4.0)
    assert (few - as_it_is).abs().max() < 0.7, "few slices change little"
    assert least_squares(own, filtered, truth, torch.zeros(8), 4.0).isfinite().all()


def test_it_is_fitted_in_float32_where_autocast_is_on():
    """As in an online evaluation with mixed precision."""
    pipeline, (latents, _) = make_pipeline(), make_latents(200)
    calibrate(pipeline, latents, seed=0)
    expected = pipeline.linear_calibration.state_dict()
    pipeline.register_modules(linear_calibration=None)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(pipeline, latents, seed=0)
    found = pipeline.linear_calibration.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fewer_than_64_subjects_have_no_calibration():
    pipeline, (latents, _) = make_pipeline(), make_latents(640)
    for subjects, components in ((63, None), (64, 24)):  # of 48 subjects
        latents = dataclasses.replace(latents, subjects=np.arange(640) % subjects)
        pipeline.register_modules(linear_calibration=None)
        calibrate(pipeline, latents, seed=0)
        calibration = pipeline.linear_calibration
        assert (calibration.config.rank if calibration else None) == components


def test_components_and_weights_are_of_different_subjects():
    """Of slices of one subject that are alike, components would seem to be known on the others."""
    pipeline, (latents, _) = make_pipeline(), make_latents(64, seed=3)
    rows = torch.arange(64).repeat(8)
    latents = LatentPosteriors(latents.posteriors[:, rows], latents.labels[rows])
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    found = {}
    for known in (True, False):
        subjects = np.array([f"s{row:02}" for row in rows]) if known else None
        pipeline.register_modules(linear_calibration=None)
        calibrate(pipeline, dataclasses.replace(latents, subjects=subjects), seed=0)
        found[known] = pipeline.linear_calibration.weights[3, 5:24, 1].mean()  # of chance
    assert found[True] < 0.7 * found[False]


def test_slices_of_a_subject_count_once():
    """Four slices of each subject that are alike draw the weights no further from (1, 0) than one."""
    pipeline, (latents, _) = make_pipeline(), make_latents(256, seed=3)
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    rows, found = torch.arange(256).repeat_interleave(4), []
    many = LatentPosteriors(latents.posteriors[:, rows], latents.labels[rows], subjects=rows.numpy())
    for data in (latents, many):
        pipeline.register_modules(linear_calibration=None)
        calibrate(pipeline, data, seed=0)
        weights = pipeline.linear_calibration.weights[3:6, :3]
        found.append((weights - torch.tensor([1.0, 0.0])).abs().mean())
    assert found[1] < 1.15 * found[0], found


def test_constant_latents_have_finite_weights():
    pipeline, (latents, _) = make_pipeline(), make_latents(100)
    latents.posteriors.zero_()
    calibrate(pipeline, latents, seed=0)
    assert pipeline.linear_calibration.weights.isfinite().all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_latents_that_are_not_finite_leave_the_denoiser_as_it_is(broken):
    pipeline, (latents, _) = make_pipeline(), make_latents(100)
    latents.posteriors[0, 7, 0, 0, 0, 0] = broken
    with pytest.warns(UserWarning, match="not finite"):
        calibrate(pipeline, latents, seed=0)
    assert pipeline.linear_calibration is None


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_short_schedules_have_fewer_timesteps(steps):
    pipeline, (latents, _) = make_pipeline(), make_latents(64)
    pipeline.scheduler = type(pipeline.scheduler).from_config(
        pipeline.scheduler.config, num_train_timesteps=steps
    )
    calibrate(pipeline, latents, seed=0)
    timesteps = pipeline.linear_calibration.config.timesteps
    assert timesteps == sorted(set(timesteps)) and timesteps[0] == 1 and timesteps[-1] == steps - 1
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["AD"], num_inference_steps=steps, output_type="pt").images
    assert images.isfinite().all()


def test_latents_of_few_elements_have_fewer_components_than_elements():
    pipeline, (latents, _) = make_pipeline(), make_latents(200)
    small = latents.posteriors[..., :1, :2]  # (4, 1, 2), which the denoiser takes as well
    calibrate(pipeline, LatentPosteriors(small, latents.labels), seed=0)
    assert pipeline.linear_calibration.config.rank == 7


# ---- train_ldm.py ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
    torch.manual_seed(0)
    vae = build_autoencoder(16, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    vae.save_pretrained(folder := tmp_path_factory.mktemp("vae"))
    return folder


@pytest.fixture
def words(vae_dir, phantom_dir, monkeypatch):
    monkeypatch.setattr(calibration, "FEWEST_SUBJECTS", 4)
    return ("--vae", vae_dir, "--data_dir", phantom_dir, *COMMON, *SHAPE)


def test_a_resumed_run_repeats_the_uninterrupted_one(words, run, tmp_path):
    words = (*words, "--learning_rate", 1e-3, "--max_steps", 4, "--checkpointing_steps", 2)
    run(train_ldm, *words, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole/checkpoints/step-00000002"
    run(train_ldm, *words, "--output_dir", tmp_path / "again", "--resume_from_checkpoint", checkpoint)
    whole, again = load(tmp_path / "whole"), load(tmp_path / "again")
    assert whole.linear_calibration.config.rank == 1
    assert hash_pipeline(whole) == hash_pipeline(again)
    whole.linear_calibration.mean += 0.01
    assert hash_pipeline(whole) != hash_pipeline(again)


def test_it_can_be_left_out(words, run, tmp_path):
    run(train_ldm, *words, *STILL, "--output_dir", tmp_path, "--linear_calibration", "false")
    assert load(tmp_path).linear_calibration is None and not (tmp_path / "linear_calibration").exists()


def test_fine_tuning_fits_it_anew_and_a_lora_is_without_it(words, ad_nc_folder, run, tmp_path):
    run(train_ldm, *words, *STILL, "--output_dir", tmp_path / "base")
    base = load(tmp_path / "base")
    own = base.linear_calibration
    names = (f"{part}/{name}" for part in ("train", "test") for name in ("AD", "NC"))
    subjects = {name: [f"{number}{place:03}" for place in range(9)] for number, name in enumerate(names, 1)}
    start = ("--init_from", tmp_path / "base", "--data_dir", ad_nc_folder(subjects), *COMMON, *STILL)
    run(train_ldm, *start, "--output_dir", tmp_path / "tuned")
    assert not torch.equal(load(tmp_path / "tuned").linear_calibration.mean, own.mean)
    run(train_ldm, *start, "--output_dir", tmp_path / "lora", "--lora_rank", 2)
    assert load(tmp_path / "lora").linear_calibration is None
    base.load_lora_weights(tmp_path / "lora")
    assert base.linear_calibration is None, "it is of other data"
    base.unload_lora_weights()
    assert base.linear_calibration is own
    base.load_lora_weights(tmp_path / "lora")
    base.fuse_lora()
    base.unload_lora_weights()
    assert base.linear_calibration is None, "the U-Net is another now"
