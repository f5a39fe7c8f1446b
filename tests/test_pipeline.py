"""Sampling: against exact denoisers, from which seed, and that a saved pipeline loads anywhere."""

import json
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from stand_ins import make_pipeline

from adni_ldm.generation import (
    SCHEDULERS,
    denoising_trajectory,
    generate_images,
    hash_pipeline,
    image_seed,
    use_scheduler,
)
from adni_ldm.models import ClassEmbedding
from adni_ldm.pipeline import ClassConditionalLDMPipeline, denormalize_latents


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class PerfectDenoiser(torch.nn.Module):
    """Predicts the velocity towards one clean latent."""

    def __init__(self, unet, scheduler, clean):
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.scheduler, self.clean = scheduler, clean

    def forward(self, noisy, timestep, encoder_hidden_states, return_dict):
        alpha = self.scheduler.alphas_cumprod[timestep]
        noise = (noisy - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * self.clean,)


def test_ddim_with_a_perfect_denoiser_returns_the_image_it_was_given(pipeline):
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    unet = pipeline.unet
    pipeline.register_modules(unet=PerfectDenoiser(unet, pipeline.scheduler, clean))
    samples = pipeline(["AD", "NC"], num_inference_steps=10, guidance_scale=1, output_type="latent").images
    assert torch.allclose(samples, clean, atol=1e-4)

    image = pipeline(["AD", "NC"], num_inference_steps=10, guidance_scale=1, output_type="pt").images
    decoded = pipeline.vae.decode(denormalize_latents(pipeline.vae, clean)).sample
    assert torch.allclose(image, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-3)


def test_guidance_one_is_no_guidance(pipeline):
    """One forward pass of the class alone; more guidance goes on from it in the direction of the class."""
    latents = torch.randn(1, 4, 8, 8)
    batch_sizes = []
    pipeline.unet.register_forward_pre_hook(lambda _module, inputs: batch_sizes.append(len(inputs[0])))
    one, two, zero = (
        pipeline(
            "AD", num_inference_steps=1, guidance_scale=scale, latents=latents, output_type="latent"
        ).images
        for scale in (1, 2, 0)
    )
    tokens = pipeline.class_embedding(torch.tensor([0])).tokens
    with torch.no_grad():
        velocity = pipeline.unet(
            latents, pipeline.scheduler.timesteps[0], encoder_hidden_states=tokens
        ).sample
    assert batch_sizes[:3] == [1, 2, 2]
    assert torch.allclose(one, -velocity, atol=1e-4), "at zero SNR one DDIM step returns x = −v"
    assert torch.allclose(two - one, one - zero, atol=1e-4)
    assert not torch.allclose(one, two)


def test_guidance_in_an_interval_asks_for_the_class_alone_outside_of_it(pipeline):
    latents, batch_sizes = torch.randn(1, 4, 8, 8), []
    pipeline.unet.register_forward_pre_hook(lambda _module, inputs: batch_sizes.append(len(inputs[0])))

    def generate(scale, interval=(0.0, 1.0)):
        batch_sizes.clear()
        options = {"guidance_scale": scale, "guidance_interval": interval, "output_type": "latent"}
        return pipeline("NC", 10, eta=0, latents=latents, **options).images

    some = generate(3, (0.2, 0.7))  # the timesteps are 999, 899, … 99
    assert batch_sizes == [1, 1, 1, 2, 2, 2, 2, 2, 1, 1]
    none, all_of_it = generate(1), generate(3)
    assert not torch.allclose(some, none, atol=1e-4) and not torch.allclose(some, all_of_it, atol=1e-4)
    assert torch.equal(generate(3, (0.9995, 1.0)), none), "no timestep lies there"


class GaussianDenoiser(torch.nn.Module):
    """The exact denoiser of latents N(mean, std²): the ODE maps noise z to mean + std · z."""

    def __init__(self, unet, alphas, mean, std):
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.alphas, self.mean, self.std = alphas, mean, std

    def forward(self, noisy, timestep, encoder_hidden_states, return_dict):
        alpha = self.alphas[int(timestep)].to(noisy)
        variance = alpha * self.std**2 + 1 - alpha
        clean = self.mean + alpha.sqrt() * self.std**2 / variance * (noisy - alpha.sqrt() * self.mean)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,)


def give_exact_denoiser(pipeline, std):
    """The noise schedule of train_ldm.py, and the exact denoiser of N(3, std²) for it."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True, **betas)
    alphas = pipeline.scheduler.alphas_cumprod
    pipeline.register_modules(unet=GaussianDenoiser(pipeline.unet, alphas, 3.0, std))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples_the_distribution_that_was_trained_on(pipeline, name):
    """At 30 and 150 steps, which do not divide the 1000 timesteps of training."""
    give_exact_denoiser(pipeline, std=1.0)
    use_scheduler(pipeline, name)
    for steps, tolerance in ((30, 0.12), (150, 0.04)):
        options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        samples = pipeline(["AD"] * 32, steps, guidance_scale=1, **options).images  # 8192 values
        assert abs(samples.mean() - 3) < 0.035, "three standard errors, for N(3, 1)"
        assert abs(samples.std() - 1) < tolerance


@pytest.mark.parametrize("steps", [7, 20, 60, 150, 334])
def test_ddim_reaches_the_solution_with_any_number_of_steps(pipeline, steps):
    """Also where diffusers' own step, 1000 // steps timesteps long, misses the next timestep."""
    give_exact_denoiser(pipeline, std=1.0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = pipeline("AD", steps, guidance_scale=1, eta=0, latents=noise, output_type="latent").images
    errors = samples - (3 + noise)
    assert errors.abs().mean() < 1.6 / steps, "of first order"
    assert abs(samples.mean() - noise.mean() - 3) < 0.02


IGNORING = {
    "HeunDiscreteScheduler": "noise schedule",
    "PNDMScheduler": "noise schedule",
    "KDPM2DiscreteScheduler": "noise schedule",
    "DPMSolverSinglestepScheduler": "timestep_spacing='trailing'",
    "FlowMatchEulerDiscreteScheduler": "prediction_type='v_prediction'",
    "IPNDMScheduler": "prediction_type='v_prediction'",
}


@pytest.mark.parametrize(("name", "ignored"), IGNORING.items())
def test_a_scheduler_that_ignores_the_training_schedule_is_named(pipeline, name, ignored):
    """`from_config` drops options that the new class does not have, and keeps them in the config."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=f"{name} .*{ignored}"):
        pipeline("AD", 2)


def test_a_saved_scheduler_keeps_the_training_schedule(pipeline, tmp_path):
    use_scheduler(pipeline, "heun")
    pipeline.scheduler.save_pretrained(tmp_path)
    use_scheduler(pipeline, "ddim")
    assert torch.equal(pipeline.scheduler.alphas_cumprod, make_pipeline().scheduler.alphas_cumprod)
    pipeline.scheduler = HeunDiscreteScheduler.from_pretrained(tmp_path)
    pipeline("AD", 2)
    use_scheduler(pipeline, "ddim")
    original = make_pipeline().scheduler.alphas_cumprod
    assert torch.allclose(pipeline.scheduler.alphas_cumprod.sqrt(), original.sqrt(), atol=5e-4)


@pytest.mark.parametrize("std", [0.1, 0.3, 1.0])
def test_20_steps_of_dpm_solver_are_more_accurate_than_50_of_ddim(pipeline, std):
    """Against the solution, from pure noise (zero terminal SNR) to the last step. Latents have std 1."""
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    give_exact_denoiser(pipeline, std)

    def error(name, steps):
        use_scheduler(pipeline, name)
        options = {"latents": noise, "guidance_scale": 1, "eta": 0, "output_type": "latent"}
        samples = pipeline(["AD"] * 8, steps, **options).images
        return (samples - (3.0 + std * noise)).square().mean().sqrt().item()

    assert error("ddim", 50) < 0.06
    assert error("dpm++", 20) < error("ddim", 20 if std < 1 else 50)
    assert std < 1 or error("dpm++", 50) < 0.015, "on the training's noise schedule"


def test_an_image_depends_on_its_seed_and_not_on_its_batch(pipeline):
    seeds = [image_seed(3, index) for index in range(5)]
    for options in ({"eta": 0.0}, {"eta": 1.0}):
        batches = [
            torch.cat(
                list(
                    generate_images(pipeline, [0, 1, 0, 1, 1], seeds, size, num_inference_steps=4, **options)
                )
            )
            for size in (1, 2, 5)
        ]
        assert torch.allclose(batches[0], batches[1], atol=1e-5)
        assert torch.allclose(batches[0], batches[2], atol=1e-5)
        assert not torch.allclose(batches[0][1], batches[0][3], atol=1e-3), "same class, other seed"
    assert len({image_seed(seed, index) for seed in range(10) for index in range(100)}) == 1000


def test_eta_makes_ddim_stochastic(pipeline):
    latents = torch.randn(1, 4, 8, 8)
    still, still_again, moved = (
        pipeline("AD", 4, latents=latents, eta=eta, generator=seeded(seed), output_type="pt").images
        for eta, seed in ((0, 1), (0, 2), (1, 1))
    )
    assert torch.equal(still, still_again)
    assert not torch.allclose(still, moved)


def test_images_of_one_seed_have_the_same_noise_at_every_step(pipeline):
    """In both classes, and in any batch: the denoiser here ignores the class, so the images are equal."""
    give_exact_denoiser(pipeline, std=1.0)
    options = {"eta": 1.0, "output_type": "latent"}
    four = pipeline(["AD", "NC"], 4, num_images_per_prompt=2, generator=seeded(7, 8, 7, 8), **options).images
    assert torch.equal(four[:2], four[2:]) and not torch.allclose(four[0], four[1], atol=1e-2)
    alone = pipeline("AD", 4, generator=seeded(8), **options).images
    assert torch.allclose(alone[0], four[1], atol=1e-5)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(8)[0])
    continued = seeded(8)
    torch.randn(1, 4, 8, 8, generator=continued[0])
    assert torch.equal(pipeline("AD", 4, latents=noise, generator=continued, **options).images, alone)


def test_the_class_changes_the_image(pipeline):
    ad, nc = (pipeline(name, 3, generator=seeded(0), output_type="pt").images for name in ("AD", "NC"))
    assert torch.equal(ad, pipeline(0, 3, generator=seeded(0), output_type="pt").images)
    assert not torch.allclose(ad, nc, atol=1e-4)


def test_output_types(pipeline):
    pil = pipeline("AD", 2, num_images_per_prompt=2, generator=seeded(0, 1)).images
    as_numpy = pipeline("AD", 2, num_images_per_prompt=2, generator=seeded(0, 1), output_type="np").images
    as_tensor = pipeline("AD", 2, num_images_per_prompt=2, generator=seeded(0, 1), output_type="pt").images
    as_tuple = pipeline("AD", 2, generator=seeded(0), output_type="latent", return_dict=False)
    assert [image.mode for image in pil] == ["L", "L"] and pil[0].size == (16, 16)
    assert as_numpy.shape == (2, 16, 16, 1) and as_tensor.shape == (2, 1, 16, 16)
    assert np.allclose(np.asarray(pil[1]) / 255, as_numpy[1, ..., 0], atol=0.5 / 255 + 1e-6)
    assert isinstance(as_tuple, tuple) and as_tuple[0].shape == (1, 4, 8, 8)


def test_the_callback_sees_and_steers_the_latents(pipeline):
    seen = []

    def stop_short(_pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    images = pipeline("AD", 3, output_type="latent", callback_on_step_end=stop_short).images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0] == (0, 999, (1, 4, 8, 8)), "sampling starts at the last timestep, pure noise"
    assert (images == 0).all()


def test_a_callback_changes_the_guidance_scale(pipeline):
    """As diffusers' dynamic guidance callbacks do; guidance may also begin after an unguided step."""
    batch_sizes = []
    pipeline.unet.register_forward_pre_hook(lambda _module, inputs: batch_sizes.append(len(inputs[0])))

    def increase(pipe, _step, _timestep, tensors):
        pipe._guidance_scale += 0.5
        return tensors

    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"latents": latents, "output_type": "latent", "guidance_scale": 1.0, "eta": 0}
    changed = pipeline("AD", 4, callback_on_step_end=increase, **options).images
    assert batch_sizes == [1, 2, 2, 2]
    assert pipeline.guidance_scale == 3 and pipeline.do_classifier_free_guidance
    assert pipeline.num_timesteps == 4
    assert not torch.allclose(changed, pipeline("AD", 4, **options).images, atol=1e-3)
    assert not pipeline.do_classifier_free_guidance


def test_a_half_precision_pipeline_decodes_in_float32(pipeline):
    dtypes = []
    pipeline.to(torch.bfloat16)
    pipeline.vae.decoder.register_forward_pre_hook(lambda _module, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pipeline("AD", 2, output_type="pt")
    assert dtypes == [torch.float32]
    assert pipeline.vae.dtype == torch.bfloat16, "and is left as it was"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "MCI"}, "classes are AD"),
        ({"class_labels": []}, "no images"),
        ({"class_labels": "AD", "output_type": "jpg"}, "output_type"),
        ({"class_labels": "AD", "num_inference_steps": 0}, "num_inference_steps"),
        ({"class_labels": "AD", "eta": 1.5}, "eta=1.5 must lie in"),
        ({"class_labels": "AD", "guidance_interval": (0.5, 0.5)}, "guidance_interval"),
        ({"class_labels": ["AD", "NC"], "generator": seeded(0)}, "1 generators for 2 images"),
        ({"class_labels": "AD", "latents": torch.zeros(1, 4, 4, 4)}, "latents must have shape"),
        ({"class_labels": "AD", "callback_on_step_end_tensor_inputs": ["tokens"]}, "tokens"),
    ],
)
def test_wrong_input_is_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_a_trajectory_goes_from_noise_to_the_image(pipeline):
    assert pipeline.config.eta == 1
    frames = denoising_trajectory(pipeline, 0, seed=7, frames=4, num_inference_steps=6)
    image = next(generate_images(pipeline, [0], [7], 1, num_inference_steps=6))
    assert frames.shape == (4, 1, 16, 16)
    assert torch.allclose(frames[-1:], image, atol=1e-5)
    assert not torch.allclose(frames[:1], image, atol=1e-2)


def test_the_decoder_is_sampled_unless_its_mean_is_asked_for(pipeline, tmp_path):
    options = {"num_inference_steps": 3, "output_type": "pt"}
    latents = torch.randn(4, 4, 8, 8) * 0.1
    decoded = pipeline.vae.decode(latents).sample.detach()
    pipeline.vae.set_decoder_noise(decoded + 0.05 * torch.randn_like(decoded), decoded)

    def images(pipeline=pipeline, **more) -> torch.Tensor:
        return pipeline(["AD", "NC"], generator=seeded(1, 2), **options, **more).images

    mean = images(decoder_noise=False)
    assert (images() - mean).std() == pytest.approx(0.025, rel=0.5)  # [0, 1]: half of the noise in [-1, 1]
    assert torch.equal(images(), images())
    one = pipeline("NC", generator=seeded(2), **options).images
    assert torch.allclose(one, images()[1:], atol=1e-5), "an image depends on its batch"
    ClassConditionalLDMPipeline(**pipeline.components, decoder_noise=False).save_pretrained(tmp_path)
    loaded = ClassConditionalLDMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(images(loaded), mean)
    assert not torch.equal(images(loaded, decoder_noise=True), mean)


@pytest.mark.parametrize(("variance", "least"), [(1.0, 0.98), (0.1, 0.95), (10.0, 0.95)])
def test_an_exact_denoiser_keeps_the_spread_of_the_latents(pipeline, monkeypatch, variance, least):
    """Of Gaussian latents the denoiser is known: with DDIM's own noise, 0.94, 0.84 and 0.96 would be left."""
    schedule = {"beta_start": 0.00085, "beta_end": 0.012}  # that of train_ldm.py
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **schedule)
    alphas = pipeline.scheduler.alphas_cumprod

    def exact(noisy, timestep, **_):
        alpha = alphas[timestep]
        clean = alpha.sqrt() * variance / (alpha * variance + 1 - alpha) * noisy
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,)

    monkeypatch.setattr(pipeline.unet, "forward", exact)
    latents = pipeline("AD", num_images_per_prompt=64, generator=seeded(0)[0], output_type="latent").images
    assert least < latents.std() / variance**0.5 < 1.02


FRESH_PROCESS = """
import sys
sys.modules["adni_ldm"] = None  # as where it is not installed: importing it raises
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipeline(["AD", 1], generator=generator, output_type="pt").images
torch.save(images, sys.argv[2])
pipeline.save_pretrained(sys.argv[3])
"""


def test_a_saved_pipeline_samples_the_same_with_and_without_the_package(pipeline, tmp_path):
    own = {"num_inference_steps": 3, "guidance_scale": 2, "eta": 0.5}
    options = {"output_type": "pt", **own}
    expected = pipeline(["AD", 1], generator=torch.Generator().manual_seed(0), **options).images
    pipeline = ClassConditionalLDMPipeline(**pipeline.components, **own)
    pipeline.save_pretrained(tmp_path / "saved")

    # With the package: its own classes, no code of the folder.
    (tmp_path / "saved" / "pipeline.py").write_text("raise SystemExit('code of the folder was run')")
    loaded = ClassConditionalLDMPipeline.from_pretrained(tmp_path / "saved")
    assert type(loaded) is ClassConditionalLDMPipeline and type(loaded.class_embedding) is ClassEmbedding
    assert hash_pipeline(loaded) == hash_pipeline(pipeline)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(["AD", 1], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(again, expected), "with the settings that are saved"

    # Without it, in a fresh process, and saved on from there.
    loaded.save_pretrained(tmp_path / "saved")
    paths = [str(tmp_path / name) for name in ("saved", "images.pt", "again")]
    result = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *paths], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert not {"Expected types", "eta", "guidance_scale"} & set(result.stderr.split()), result.stderr
    assert torch.allclose(torch.load(tmp_path / "images.pt"), expected, atol=1e-6)
    resaved = ClassConditionalLDMPipeline.from_pretrained(tmp_path / "again")
    assert hash_pipeline(resaved) == hash_pipeline(pipeline) and resaved.sampling_settings() == own


def test_the_sampling_settings_are_in_the_index_and_in_the_call(pipeline, tmp_path, caplog):
    assert pipeline.sampling_settings() == {"num_inference_steps": 50, "guidance_scale": 1, "eta": 1}
    own = {"num_inference_steps": 3, "guidance_scale": 2, "eta": 0}
    ClassConditionalLDMPipeline(**pipeline.components, **own).save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    saved = json.loads(index.read_text())
    assert {name: saved[name] for name in own} == own

    diffusers.utils.logging.enable_propagation()
    with warnings.catch_warnings(action="error"):
        loaded = ClassConditionalLDMPipeline.from_pretrained(tmp_path)
        other = ClassConditionalLDMPipeline.from_pretrained(tmp_path, guidance_scale=1.5)
        index.write_text(json.dumps({name: value for name, value in saved.items() if name not in own}))
        old = ClassConditionalLDMPipeline.from_pretrained(tmp_path)
        assert (loaded.guidance_scale, other.guidance_scale) == (2, 1.5), "before a call, and no warning"
    diffusers.utils.logging.disable_propagation()
    assert not caplog.records
    assert loaded.sampling_settings() == own and loaded.sampling_settings(eta=0.5) == own | {"eta": 0.5}
    assert other.sampling_settings() == own | {"guidance_scale": 1.5}
    assert old.sampling_settings() == pipeline.sampling_settings(), "a folder of before they were saved"

    noise = torch.randn(1, 4, 8, 8)
    for given in ({}, {"num_inference_steps": 5}, {"guidance_scale": 0}, {"eta": 1.0}):
        images = [
            pipe("AD", latents=noise, generator=seeded(0), output_type="latent", **options).images
            for pipe, options in ((loaded, given), (pipeline, own | given))
        ]
        assert torch.equal(*images)
    with pytest.raises(ValueError, match="eta=-1"):
        ClassConditionalLDMPipeline(**pipeline.components, eta=-1)
