"""The autoencoder on patches of pixels, and the samples of its decoder."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from adni_ldm.errors import UserError
from adni_ldm.evaluation.spectrum import radial_power
from adni_ldm.loading import load_autoencoder
from adni_ldm.models import SliceAutoencoder, build_autoencoder, latent_shape

WIDTHS = (16, 32)


def smooth_images(count: int, side: int = 32) -> torch.Tensor:
    """Images (count, 1, side, side) that take all intensities from -1 to 1, slowly over the image."""
    phase = torch.rand(count, 1, 1, 1) * 6
    return torch.sin(phase + torch.linspace(0, 3, side)).expand(-1, -1, side, -1).contiguous()


def test_patches_enter_and_leave_as_channels(tmp_path):
    vae = build_autoencoder(32, widths=WIDTHS, patch_size=2)
    vae.save_pretrained(tmp_path)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    plain = AutoencoderKL.from_pretrained(tmp_path)  # the same weights, without the patches
    latents = plain.encode(F.pixel_unshuffle(images, 2)).latent_dist.mean
    decoded = F.pixel_shuffle(plain.decode(latents).sample, 2)
    loaded = load_autoencoder(str(tmp_path))
    assert loaded.patch_size == 2 and latent_shape(loaded, 32) == (4, 8, 8) == latents.shape[1:]
    assert torch.equal(loaded.encode(images).latent_dist.mean, latents)
    assert torch.equal(loaded.decode(latents).sample, decoded)


def test_a_side_that_is_no_multiple_of_patches_and_levels_is_refused():
    with pytest.raises(UserError, match="multiple of 8"):
        build_autoencoder(36, widths=WIDTHS, patch_size=4)
    with pytest.raises(UserError, match="multiple of 4"):
        latent_shape(build_autoencoder(32, widths=WIDTHS, patch_size=2), 30)


def test_an_autoencoder_of_other_channels_is_not_taken_for_one_of_patches(tmp_path):
    AutoencoderKL(in_channels=4, out_channels=4, block_out_channels=(32,)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="4 input and 4 output channels"):
        load_autoencoder(str(tmp_path))


def test_a_sampled_decoder_has_the_residuals_of_the_held_out_slices():
    """Residuals that grow with intensity, smooth, and absent in the background, are reproduced so."""
    torch.manual_seed(0)
    vae = build_autoencoder(32, widths=WIDTHS)
    decoded = smooth_images(512)
    decoded[..., :8] = -1  # background
    color = F.avg_pool2d(torch.randn(512, 1, 34, 34), 3, stride=1)
    residual = 0.1 * (decoded + 1) * color
    vae.set_decoder_noise(decoded + residual, decoded)
    noise = vae._noise(decoded, torch.Generator().manual_seed(1))
    assert noise[..., :8].abs().max() < 2e-3
    for low in (-0.5, 0.0, 0.5):
        inside = (decoded > low) & (decoded < low + 0.4)
        assert noise[inside].std() == pytest.approx(residual[inside].std().item(), rel=0.2)
    (_, found), (_, expected) = (radial_power(part - 1) for part in (noise, residual))
    np.testing.assert_allclose(found.mean(0)[2:12], expected.mean(0)[2:12], rtol=0.3, atol=0.03)
    assert expected.mean(0)[12] < 0.5 * expected.mean(0)[3], "the spectrum is not flat"


@torch.no_grad()
def test_decoding_is_the_mean_without_a_generator_and_repeats_with_one(tmp_path):
    torch.manual_seed(0)
    vae = build_autoencoder(16, widths=WIDTHS)
    latents = torch.randn(3, 4, 8, 8)
    mean = vae.decode(latents).sample
    assert torch.equal(vae.decode(latents, generator=torch.Generator()).sample, mean), "nothing measured"
    vae.set_decoder_noise(mean + 0.1 * torch.randn_like(mean), mean)
    vae.save_pretrained(tmp_path)
    vae = SliceAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(vae.decode(latents).sample, mean)

    def sample(rows: slice) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)][rows]
        return vae.decode(latents[rows], generator=generators).sample

    whole = sample(slice(0, 3))
    assert (whole - mean).std() == pytest.approx(0.1, rel=0.2)
    assert torch.allclose(whole[1:2], sample(slice(1, 2)), atol=1e-5), "an image depends on its batch"
