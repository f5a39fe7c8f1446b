"""Counterfactuals and class interpolation: what they preserve and change, and what sample.py writes."""

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from test_pipeline import PerfectDenoiser
from test_recipes import run

import sample
from adni_ldm.errors import UserError
from adni_ldm.generation import generate_images, interpolate_classes
from adni_ldm.pipeline import ClassConditionalLDMPipeline


@pytest.fixture
def slices():
    noise = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return 2 * noise - 1


def test_strength_zero_is_the_autoencoder(pipeline, slices):
    result = pipeline.counterfactual(slices, "NC", "AD", strength=0)
    with torch.no_grad():
        expected = pipeline.vae(slices).sample.clamp(-1, 1)
    assert torch.allclose(result.images, expected, atol=1e-5)
    assert torch.equal(result.images, result.round_trip)
    assert torch.allclose(result.difference, (expected - slices) / 2, atol=1e-5)
    assert torch.allclose(result.error, (expected - slices).abs() / 2, atol=1e-5)


def test_the_round_trip_comes_home_and_more_steps_bring_it_nearer(pipeline, slices):
    home = pipeline.counterfactual(slices, strength=0).images

    def lost(strength, steps):
        result = pipeline.counterfactual(slices, "NC", "AD", strength, steps)
        return (result.round_trip - home).abs().mean().item()

    coarse, fine = lost(0.5, 5), lost(0.5, 15)
    assert fine < 0.005, "a random network; the other class moves the slices by 0.27"
    assert fine < coarse / 9
    assert lost(0.2, 5) < coarse < lost(1, 5), "the farther, the more is lost"
    assert lost(1, 25) < 0.02, "from pure noise as well, where ᾱ is 0"


def test_the_other_class_changes_the_slice_and_more_guidance_changes_it_more(pipeline, slices):
    def moved(guidance_scale, target="AD"):
        result = pipeline.counterfactual(slices, "NC", target, 0.5, 8, guidance_scale)
        return (result.images - result.round_trip).abs().mean()

    assert moved(1) > 0.05
    assert moved(0.2) < moved(1)
    assert moved(2) > moved(1)
    assert moved(1, target="NC") == 0 and moved(3, target="NC") < 1e-4, "its own class is the round trip"


def test_inversion_undoes_ddim_of_the_scheduler(pipeline):
    """DDIM inversion recovers the initial noise of a sample, from pure noise."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    latents = pipeline(
        "AD", num_inference_steps=50, guidance_scale=1, eta=0, latents=noise, output_type="latent"
    ).images
    timesteps = pipeline.scheduler.timesteps.flip(0)
    tokens = pipeline.class_embedding(torch.tensor([0])).tokens
    assert torch.allclose(pipeline.ddim(noise, timesteps, tokens), latents, atol=1e-3)
    assert (pipeline.ddim(latents, timesteps, tokens, invert=True) - noise).abs().max() < 0.05


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_perfect_denoiser_is_walked_exactly(pipeline, prediction_type):
    """If every prediction leads to one clean latent, DDIM ends there from any noise."""
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": False}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    perfect = PerfectDenoiser(pipeline.unet, pipeline.scheduler, clean)
    if prediction_type == "epsilon":

        def forward(noisy, timestep, encoder_hidden_states, return_dict):
            alpha = pipeline.scheduler.alphas_cumprod[timestep]
            return ((noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt(),)

        perfect.forward = forward
    pipeline.register_modules(unet=perfect)
    tokens = pipeline.class_embedding(torch.tensor([0])).tokens
    noise = torch.randn(1, 4, 8, 8)
    assert torch.allclose(pipeline.ddim(noise, torch.tensor([9, 499, 999]), tokens), clean, atol=0.02)


def test_a_morph_begins_and_ends_with_samples_of_the_classes(pipeline):
    for guidance_scale in (1, 1.5):
        options = {"num_inference_steps": 5, "guidance_scale": guidance_scale}
        frames = interpolate_classes(pipeline, "NC", "AD", seed=7, frames=4, **options)
        ends = torch.cat(list(generate_images(pipeline, [1, 0], [7, 7], 2, eta=0, **options)))
        assert frames.shape == (4, 1, 16, 16)
        assert torch.allclose(frames[[0, -1]], ends, atol=1e-4)
        steps = (frames[1:] - frames[:-1]).abs().mean((1, 2, 3))
        assert (steps > 0).all() and (frames[-1] - frames[0]).abs().mean() > steps.max(), "bit by bit"


def test_steps_and_guidance_are_the_models_own_and_nothing_is_random(pipeline, slices):
    """Also of a model that samples with η = 1: inversion needs determinism."""
    own = {"num_inference_steps": 3, "guidance_scale": 2.0}
    tuned = ClassConditionalLDMPipeline(**pipeline.components, **own, eta=1.0)
    found, again = (tuned.counterfactual(slices, "NC", "AD") for _ in range(2))
    expected = pipeline.counterfactual(slices, "NC", "AD", **own)
    assert all(torch.equal(*parts) for parts in (*zip(found, again), *zip(found, expected)))
    frames = [interpolate_classes(*args) for args in [(tuned, "NC", "AD", 7, 3)] * 2]
    expected = interpolate_classes(pipeline, "NC", "AD", 7, 3, **own)
    assert torch.equal(*frames) and torch.equal(frames[0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "MCI"}, "classes are AD"),
        (
            {"image": torch.zeros(1, 16, 16)},
            r"image must be \(B, 1, 16, 16\) in \[-1, 1\], not \(1, 16, 16\)",
        ),
        ({"image": torch.zeros(1, 3, 16, 16)}, r"not \(1, 3, 16, 16\)"),
        ({"image": torch.full((1, 1, 16, 16), 255.0)}, r"in \[-1, 1\]"),
        ({"image": torch.full((1, 1, 16, 16), torch.nan)}, r"in \[-1, 1\]"),
        ({"strength": 1.2}, "strength=1.2"),
        ({"num_inference_steps": 1}, "num_inference_steps=1"),
    ],
)
def test_wrong_input_is_refused(pipeline, slices, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.counterfactual(**{"image": slices, **arguments})


def test_a_scheduler_of_other_latents_is_refused(pipeline, slices):
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        pipeline.counterfactual(slices)


# ---- sample.py -----------------------------------------------------------------------------------------


@pytest.fixture
def model(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sample_writes_a_counterfactual(model, phantom_dir, tmp_path):
    scan = next((phantom_dir / "test/NC").glob("*.png"))
    command = (
        "sample.py",
        "--model",
        model,
        "--from_image",
        scan,
        "--num_inference_steps",
        3,
        "--output_dir",
    )
    output = run(*command, tmp_path / "out", "--to", "AD")
    assert "round-trip error" in output
    names = {"counterfactual.png", "difference.png", "side_by_side.png", "metadata.csv"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    with Image.open(tmp_path / "out/counterfactual.png") as image:
        assert (image.mode, image.size) == ("L", (16, 16))
    row = pd.read_csv(tmp_path / "out/metadata.csv").iloc[0]
    assert row["from"] == "NC", "from metadata.csv beside the slice"
    assert row.to == "AD" and 0 < row.round_trip_error <= row.round_trip_error_max <= 1

    colours = np.asarray(Image.open(tmp_path / "out/difference.png")).astype(int)
    with Image.open(tmp_path / "out/counterfactual.png") as image:
        new = np.asarray(image).astype(int)
    old = np.asarray(Image.open(scan).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    brighter, darker = new > old + 3, new < old - 3
    assert (colours[..., 0] >= colours[..., 2])[brighter].all(), "red where it got brighter"
    assert (colours[..., 2] >= colours[..., 0])[darker].all(), "blue where it got darker"


def test_sample_writes_a_morph(model, tmp_path):
    command = (
        "sample.py",
        "--model",
        model,
        "--num_inference_steps",
        3,
        "--from",
        "NC",
        "--to",
        "AD",
        "--morph",
        5,
    )
    run(*command, "--output_dir", tmp_path / "out")
    with Image.open(tmp_path / "out/morph.gif") as film:
        assert film.size == (16, 16) and film.n_frames == 8, "there and back, no end twice"
    assert Image.open(tmp_path / "out/morph.png").width > 300


def test_missing_arguments_are_named(model, phantom_dir, tmp_path, monkeypatch):
    scan = next((phantom_dir / "test/NC").glob("*.png"))
    lone = tmp_path / "lone.png"
    Image.open(scan).save(lone)
    (tmp_path / "text.png").write_text("not an image")
    for words, message in (
        (("--from_image", lone, "--to", "AD"), "give it, such as --from NC"),
        (("--from_image", lone, "--from", "NC"), "--to is missing"),
        (("--from_image", tmp_path / "text.png", "--from", "NC", "--to", "AD"), "not an image"),
        (("--from_image", lone, "--from", "NC", "--to", "MCI"), "classes are AD"),
        (("--morph", 5, "--to", "AD"), "--from is missing"),
        (("--morph", 1, "--from", "NC", "--to", "AD"), "at least 2 frames"),
        (("--morph", 5, "--from", "NC", "--to", "AD", "--scheduler", "euler"), "--scheduler ddim"),
        (("--morph", 5, "--from", "NC", "--to", "AD", "--eta", 1), "--eta 0 only"),
    ):
        command = ("sample.py", "--model", model, "--output_dir", tmp_path / "out", *words)
        monkeypatch.setattr("sys.argv", [str(word) for word in command])
        with pytest.raises(UserError, match=message):
            sample.main()
        assert not (tmp_path / "out").exists()
