"""The linear calibration: the Wiener filter's formula, its combination with a denoiser, and the pipeline."""

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from stand_ins import make_pipeline

from adni_ldm.models.linear_calibration import SCHEDULE, LinearCalibration
from adni_ldm.pipeline import ClassConditionalLDMPipeline

OPTIONS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_scheduler(prediction_type):
    zero_snr = prediction_type == "v_prediction"
    return DDPMScheduler(**OPTIONS, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr)


def make_calibration(scheduler, shape=(2, 4, 4), rank=3, timesteps=(400, 900, 999)):
    """Of Gaussian latents with components of variance 9, 4 and 2."""
    schedule = {name: scheduler.config[name] for name in SCHEDULE}
    kind = scheduler.config.prediction_type
    calibration = LinearCalibration(shape, rank, timesteps, schedule, kind)
    elements = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(7)
    calibration.mean.copy_(torch.linspace(-1, 1, elements))
    calibration.components.copy_(torch.linalg.qr(torch.randn(elements, rank, generator=generator)).Q.T)
    calibration.variances.copy_(torch.tensor([9.0, 4.0, 2.0]))
    return calibration


def test_a_schedule_of_given_betas_is_the_schedulers():
    """Which a pipeline of --init_from may have."""
    scheduler = DDPMScheduler(trained_betas=torch.linspace(1e-4, 0.05, 1000).tolist())
    schedule = {name: scheduler.config[name] for name in SCHEDULE}
    calibration = LinearCalibration((2, 4, 4), 3, (400, 999), schedule, "epsilon")
    assert torch.equal(calibration.alphas_cumprod, scheduler.alphas_cumprod)


def set_weights(calibration, alpha, beta):
    calibration.weights.copy_(torch.tensor([alpha, beta]).expand_as(calibration.weights))


def covariance(calibration):
    directions = calibration.components.T.double()
    return directions * calibration.variances.double() @ directions.T


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("timestep", [400, 900])
def test_the_wiener_filter_is_the_conditional_mean_of_gaussian_latents(prediction_type, timestep):
    """E[z | x] = μ + √ᾱ Σ (ᾱ Σ + (1−ᾱ) I)⁻¹ (x − √ᾱ μ) with the whole covariance, α = 0 and β = 1.

    Of the components alone: what is orthogonal to them stays the denoiser's.
    """
    scheduler = make_scheduler(prediction_type)
    calibration = make_calibration(scheduler)
    set_weights(calibration, 0.0, 1.0)
    noisy, prediction = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    alpha = scheduler.alphas_cumprod[timestep].double()
    mean, sigma = calibration.mean.double(), covariance(calibration)
    x = noisy.flatten(1).double()
    total = alpha * sigma + (1 - alpha) * torch.eye(32, dtype=torch.float64)
    clean = mean + alpha.sqrt() * (x - alpha.sqrt() * mean) @ torch.linalg.solve(total, sigma)
    expected = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    if prediction_type == "v_prediction":
        expected = alpha.sqrt() * expected - (1 - alpha).sqrt() * clean
    found = calibration(prediction, noisy, torch.tensor(timestep)).flatten(1)
    ours, others = calibration.components.double(), found.double() - prediction.flatten(1).double()
    assert torch.allclose(found.double() @ ours.T, expected @ ours.T, atol=1e-4)
    assert torch.allclose(others, others @ ours.T @ ours, atol=1e-5)
    # Half precision, in which a GPU samples, changes it little.
    halved = make_calibration(scheduler)
    halved.load_state_dict(calibration.state_dict())
    rough = halved.to(torch.bfloat16)(prediction, noisy, torch.tensor(timestep)).flatten(1)
    assert (rough - found).square().mean() < 2e-3 * found.square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(calibration(prediction, noisy, torch.tensor(timestep)).flatten(1), found)


def test_weights_of_one_and_zero_change_nothing_and_others_are_interpolated():
    calibration = make_calibration(make_scheduler("v_prediction"))
    noisy, prediction = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(calibration(prediction, noisy, torch.tensor(500)), prediction)
    set_weights(calibration, 1.0, 0.0)
    calibration.weights[1] = torch.tensor([0.0, 0.8])  # at timestep 900
    for timestep, alpha, beta in ((900, 0.0, 0.8), (650, 0.5, 0.4), (400, 1.0, 0.0), (200, 1.0, 0.0)):
        weights = calibration._at(torch.tensor(timestep), calibration.weights, (1.0, 0.0))
        assert torch.allclose(weights, torch.tensor([alpha, beta]).expand(1, 3, 2)), timestep
    set_weights(calibration, 0.0, 1.0)
    places = torch.tensor([0, 100, 999, 650.5])
    weights = calibration._at(places, calibration.weights, (1.0, 0.0))[:, 0]
    assert torch.allclose(weights, torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0], [0.0, 1.0]]))


def test_each_latent_has_its_timestep():
    calibration = make_calibration(make_scheduler("v_prediction"))
    set_weights(calibration, 0.3, 0.6)
    noisy, prediction = torch.randn(2, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([100, 900])
    rows = (slice(0, 1), slice(1, 2))
    each = [calibration(prediction[row], noisy[row], step) for row, step in zip(rows, timesteps)]
    assert torch.allclose(calibration(prediction, noisy, timesteps), torch.cat(each), atol=1e-5)


def test_posterior_noise_has_the_errors_of_its_directions():
    scheduler = make_scheduler("v_prediction")
    calibration = make_calibration(scheduler)
    calibration.errors[1] = torch.tensor([2.0, 1.0, 0.5, 0.1])  # at timestep 900; 1 at the others
    white = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    noise = calibration.posterior_noise(white, 900) * (1 - scheduler.alphas_cumprod[900]).sqrt()
    part, found = (one.flatten(1) @ calibration.components.T for one in (white, noise))
    assert torch.allclose(found, part * torch.tensor([2.0, 1.0, 0.5]).sqrt(), atol=1e-5)
    rest, others = (one.flatten(1) - one.flatten(1) @ calibration.components.T @ calibration.components
                    for one in (white, noise))  # fmt: skip
    assert torch.allclose(others, 0.1**0.5 * rest, atol=1e-5)
    half = calibration.posterior_noise(white, 200) * (1 - scheduler.alphas_cumprod[200]).sqrt()
    assert torch.allclose(half, 0.5**0.5 * white, atol=1e-5), "from 0 at timestep 0"


# ---- In a pipeline -----------------------------------------------------------------------------------------


def make_calibrated():
    pipeline = make_pipeline()
    calibration = make_calibration(pipeline.scheduler, (4, 8, 8))
    set_weights(calibration, 0.2, 0.7)
    return ClassConditionalLDMPipeline(**pipeline.components | {"linear_calibration": calibration})


def images(pipeline, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 3, "output_type": "pt", "generator": generator} | options
    return pipeline(["AD", "NC"], **options).images


def test_a_pipeline_with_it_loads_where_the_package_is_not(tmp_path):
    pipeline = make_calibrated()
    expected = images(pipeline)
    pipeline.save_pretrained(tmp_path)
    alone = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(alone.linear_calibration).__module__.startswith("diffusers_modules")
    for loaded in (alone, ClassConditionalLDMPipeline.from_pretrained(tmp_path)):
        assert torch.equal(images(loaded), expected)
    without = ClassConditionalLDMPipeline(**pipeline.components | {"linear_calibration": None})
    assert not torch.allclose(images(without), expected, atol=1e-3), "it has an effect"


def test_networks_that_lie_in_the_hosts_memory_sample_with_it():
    pipeline = make_calibrated()
    expected = images(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(images(pipeline), expected)


def test_guidance_extrapolates_calibrated_predictions():
    pipeline = make_calibrated()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    timestep = torch.tensor(700)
    classes = [pipeline.encode_classes(torch.tensor(labels)) for labels in ([2, 2], [0, 1])]
    null, given = (pipeline._predict(latents, timestep, tokens, 1) for tokens in classes)
    guided = pipeline._predict(latents, timestep, torch.cat(classes), 3)
    assert torch.allclose(guided, null + 3 * (given - null), atol=1e-5)


def test_schedulers_that_scale_their_latents_agree_with_ddim():
    """Euler's latents have variance σ² + 1, and the calibration is of those of variance 1."""
    pipeline = make_calibrated()
    pipeline.scheduler = type(pipeline.scheduler)(**OPTIONS, clip_sample=False, timestep_spacing="trailing")
    own = pipeline.linear_calibration
    other = make_calibration(DDPMScheduler(**OPTIONS), (4, 8, 8))
    other.load_state_dict(own.state_dict())
    set_weights(other, 0.0, 1.0)
    pipeline.register_modules(linear_calibration=other)
    one = images(pipeline, num_inference_steps=100, eta=0.0, output_type="latent")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    euler = images(pipeline, num_inference_steps=100, output_type="latent")
    assert (one - euler).square().mean() < 0.01 * one.square().mean()


def test_ancestral_sampling_of_gaussian_latents_keeps_their_variances():
    """With the Wiener filter and its errors each of 20 steps is exact, where variance is large too."""
    pipeline, steps, variances = make_pipeline(), 20, torch.tensor([100.0, 10.0, 4.0])
    places = tuple(range(49, 1000, 50))
    calibration = make_calibration(pipeline.scheduler, (4, 8, 8), timesteps=places)
    calibration.variances.copy_(variances)
    set_weights(calibration, 0.0, 1.0)
    alpha = pipeline.scheduler.alphas_cumprod[list(places)][:, None]
    calibration.errors[:, :3] = variances * (1 - alpha) / (alpha * variances + 1 - alpha)
    pipeline.register_modules(linear_calibration=calibration)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "eta": 1.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(5)
    latents = pipeline(["AD"] * 1000, generator=generator, **options).images.flatten(1)
    found = calibration.coordinates(latents).square().mean(0) / variances
    assert found.sqrt() == pytest.approx([1, 1, 1], abs=0.06), "β makes 0.85 of the first"
