"""train_vae.py --decoder_only: the decoder is trained, and the latents stay what they were."""

import shutil
import signal
import sys

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import train_ldm
import train_vae
from adni_ldm.data.provenance import records_by_part
from adni_ldm.data.slices import SliceTensors, open_folder, read_slices, to_arrays
from adni_ldm.errors import UserError
from adni_ldm.evaluation.spectrum import band_power
from adni_ldm.loading import load_autoencoder, load_pipeline
from adni_ldm.models import build_autoencoder
from adni_ldm.training.latents import latent_encoder

COMMON = ("--image_size", 32, "--batch_size", 4, "--warmup_steps", 0, "--log_steps", 1, "--num_workers", 0)
COMMON += ("--mixed_precision", "no", "--report_to", "none", "--checkpointing_steps", 0)
VAE = (*COMMON, "--learning_rate", 2e-3, "--eval_images", 4)
LDM = (*COMMON, "--unet_widths", 32, 64, "--token_dim", 8, "--layers_per_block", 1, "--validation_steps", 0)
FINISH = ("--decoder_only", "--spectral_weight", 30)
WEIGHTS, UNET = "diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.safetensors"
STATISTICS = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")


def run(recipe, *words):
    """Run a recipe in this process by its command line."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, words)])
        try:
            recipe.main()
        finally:
            AcceleratorState._reset_state(True)
            for number, handler in kept.items():
                signal.signal(number, handler)


@pytest.fixture(scope="module")
def data(phantom_dir):
    return ("--data_dir", phantom_dir)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """A VAE that is trained until its reconstructions are recognizable and smooth."""
    folder = tmp_path_factory.mktemp("start")
    run(train_vae, *data, *VAE, "--widths", 8, 16, "--max_steps", 150, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def finished(data, start, tmp_path_factory):
    """Its decoder trained further; the weight of the KL divergence would be seen in any loss."""
    folder = tmp_path_factory.mktemp("finished")
    words = ("--init_from", start, "--max_steps", 60, "--kl_weight", 1, "--gradient_checkpointing")
    run(train_vae, *data, *VAE, *FINISH, *words, "--output_dir", folder)
    return folder


def equal(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_encoder_and_statistics_stay_and_the_decoder_learns(start, finished):
    before, after = (load_autoencoder(str(folder)) for folder in (start, finished))
    assert equal(latent_encoder(before), latent_encoder(after))
    assert [before.config[name] for name in STATISTICS] == [after.config[name] for name in STATISTICS]
    for part in ("decoder", "post_quant_conv"):
        assert not equal(getattr(before, part), getattr(after, part))
    table = pd.read_csv(finished / "metrics.csv").dropna(subset="loss")
    expected = table.reconstruction_loss + 30 * table.spectral_loss
    assert table.loss.tolist() == pytest.approx(expected.tolist(), rel=1e-4), "without the KL divergence"
    assert records_by_part(finished) == records_by_part(start), "the same slices are recorded once"


@torch.no_grad()
def test_a_spectral_loss_brings_back_the_power_of_high_frequencies(start, finished, phantom_dir):
    listing = open_folder(phantom_dir, ("AD", "NC"), None)
    slices = SliceTensors(to_arrays(read_slices(listing, 0.1)["test"], 32))
    images = torch.stack([slices[index]["image"] for index in range(len(slices))])
    ratios = []
    for folder in (start, finished):
        vae = load_autoencoder(str(folder))
        reconstructions = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(
            band_power(reconstructions)["above 0.6"].mean() / band_power(images)["above 0.6"].mean()
        )
    assert ratios[0] < ratios[1] < 1.1 and 1 - ratios[1] < 0.7 * (1 - ratios[0])


def test_a_pipeline_takes_the_decoder_and_the_cache_is_read_again(data, start, finished, tmp_path):
    """An LDM begun on the first VAE continues with the second: the same U-Net, another decoder."""
    cache = tmp_path / "latents"
    words = (*data, *LDM, "--max_steps", 4, "--latent_cache", cache, "--checkpointing_steps", 2)
    run(train_ldm, *words, "--vae", start, "--output_dir", tmp_path / "ldm")
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    resume = ("--resume_from_checkpoint", tmp_path / "ldm/checkpoints/step-00000002")
    run(train_ldm, *words, "--vae", finished, "--output_dir", tmp_path / "resumed", *resume)
    assert len(files) == 2 and files == {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    first, second = (load_file(tmp_path / name / UNET) for name in ("ldm", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    # Two files put it into a pipeline that is trained, with the record of its training data.
    for name in ("config.json", WEIGHTS):
        shutil.copy(finished / name, tmp_path / "ldm/vae" / name)
    copied, resumed = (load_pipeline(str(tmp_path / name)) for name in ("ldm", "resumed"))
    assert equal(copied.vae, resumed.vae) and equal(copied.vae, load_autoencoder(str(finished)))
    assert records_by_part(tmp_path / "ldm")["vae"] == records_by_part(finished)["vae"] != []

    other = load_autoencoder(str(start))
    with torch.no_grad():
        other.quant_conv.bias += 0.1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="encoder of the VAE was"):
        run(train_ldm, *words, "--vae", tmp_path / "other", "--output_dir", tmp_path / "refused", *resume)


def test_a_resume_repeats_the_uninterrupted_run(data, start, finished, tmp_path):
    """With a discriminator, accumulation and EMA: bit for bit. Another VAE to start from is refused."""
    words = (*data, *VAE, *FINISH, "--max_steps", 4, "--checkpointing_steps", 2, "--use_ema")
    words += ("--gradient_accumulation_steps", 2, "--discriminator_weight", 0.5)
    words += ("--discriminator_width", 8, "--discriminator_start", 0)
    run(train_vae, *words, "--init_from", start, "--output_dir", tmp_path / "whole")
    resume = ("--resume_from_checkpoint", tmp_path / "whole/checkpoints/step-00000002")
    run(train_vae, *words, "--init_from", start, "--output_dir", tmp_path / "resumed", *resume)
    whole, resumed, first = (
        load_file(folder / WEIGHTS) for folder in (tmp_path / "whole", tmp_path / "resumed", start)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    kept = {name for name in whole if torch.equal(whole[name], first[name])}
    assert kept == {name for name in whole if name.startswith(("encoder.", "quant_conv."))}
    with pytest.raises(UserError, match="weights of --init_from was"):
        run(train_vae, *words, "--init_from", finished, "--output_dir", tmp_path / "refused", *resume)


def test_the_scale_of_an_autoencoder_from_elsewhere_stays(data, tmp_path):
    """As of Stable Diffusion 3's: with a shift, and without a quant_conv."""
    # Without the note of what were defaults, which from_config would keep in place of what is given.
    own = build_autoencoder(32, widths=(8, 16)).config
    config = {name: value for name, value in own.items() if name[0] != "_"} | {"use_quant_conv": False}
    vae = AutoencoderKL.from_config(config | {"scaling_factor": 0.5, "shift_factor": 0.25})
    vae.save_pretrained(tmp_path / "sd")
    words = (*data, *VAE, *FINISH, "--init_from", tmp_path / "sd", "--max_steps", 1)
    run(train_vae, *words, "--output_dir", tmp_path / "vae")
    tuned = load_autoencoder(str(tmp_path / "vae"))
    assert [tuned.config[name] for name in STATISTICS] == [[0.25] * 4, [2.0] * 4, 1.0, None]
    assert equal(tuned.encoder, vae.encoder) and not equal(tuned.decoder, vae.decoder)


def test_a_decoder_alone_is_not_trained_from_random_weights(data):
    with pytest.raises(UserError, match="--decoder_only: .*--init_from"):
        run(train_vae, *data, *VAE, *FINISH)
