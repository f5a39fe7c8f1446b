"""The networks that the builders make, and the sizes that they refuse."""

import pytest
import torch

from adni_ldm.errors import UserError
from adni_ldm.models import ClassEmbedding, ConditionalDenoiser, build_autoencoder, build_denoiser
from adni_ldm.models.autoencoder import ReconstructingVAE, latent_shape


@pytest.mark.parametrize(("widths", "factor"), [((16, 32), 2), ((16, 32, 64), 4)])
def test_each_level_but_one_halves_the_slice(widths, factor):
    vae = build_autoencoder(32, latent_channels=3, widths=widths)
    images = torch.rand(2, 1, 32, 32) * 2 - 1
    reconstruction, mean, logvar = ReconstructingVAE(vae)(
        images, torch.zeros(2, 3, 32 // factor, 32 // factor)
    )
    assert reconstruction.shape == images.shape
    assert mean.shape == logvar.shape == (2, *latent_shape(vae, 32)) == (2, 3, 32 // factor, 32 // factor)


def test_the_latents_are_posterior_samples_of_the_noise():
    vae = build_autoencoder(16, widths=(16, 32))
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    noise = torch.randn(2, 4, 8, 8)
    posterior = vae.encode(images).latent_dist
    expected = vae.decode(posterior.mean + posterior.std * noise).sample
    assert torch.allclose(ReconstructingVAE(vae)(images, noise)[0], expected)


def test_decoding_leaves_autocast_where_fp16_would_overflow():
    vae = build_autoencoder(16, widths=(16, 32))
    images, noise = torch.zeros(1, 1, 16, 16), torch.zeros(1, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ReconstructingVAE(vae)(images, noise)[0].dtype == torch.bfloat16
        assert ReconstructingVAE(vae, decode_in_float32=True)(images, noise)[0].dtype == torch.float32


def test_every_class_reaches_the_prediction():
    torch.manual_seed(0)
    denoiser = ConditionalDenoiser(
        build_denoiser(4, 8, widths=(32, 64), token_dim=16), ClassEmbedding(token_dim=16)
    )
    noisy = torch.randn(1, 4, 8, 8).expand(3, -1, -1, -1)
    with torch.no_grad():
        ad, nc, null = denoiser(noisy, torch.tensor([500] * 3), torch.tensor([0, 1, 2]))
    assert ad.shape == (4, 8, 8)
    assert not torch.allclose(ad, nc, atol=1e-5)
    assert not torch.allclose(ad, null, atol=1e-5)


def test_attention_heads_have_the_given_width():
    """diffusers calls the number of heads `attention_head_dim`; swapping the two is a known trap."""
    unet = build_denoiser(4, 8, widths=(32, 64), token_dim=16)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert attention.heads == 2
    assert attention.inner_dim // attention.heads == 32


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_autoencoder(50, widths=(16, 32, 64)),
        lambda: build_denoiser(4, 6, widths=(32, 64, 64)),
        lambda: build_denoiser(4, 8, widths=(32, 50)),
        lambda: latent_shape(build_autoencoder(32, widths=(16, 32, 64)), 30),
    ],
)
def test_sizes_that_do_not_fit_are_refused(build):
    with pytest.raises(UserError, match="multiple"):
        build()
