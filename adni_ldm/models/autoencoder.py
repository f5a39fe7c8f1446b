"""The autoencoder (VAE): slices to latents and back."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.models.slice_autoencoder import SliceAutoencoder


def build_autoencoder(
    image_size: int,  # side of the square slice
    latent_channels: int = 4,
    widths: Sequence[int] = (64, 128, 256, 256),  # channels per level; each level but one halves
    layers_per_block: int = 1,
    mid_attention: bool = False,  # self-attention at the coarsest level: (h·w)² memory, little gain
    patch_size: int = 1,  # side of the patches of pixels that the first level sees as channels
) -> SliceAutoencoder:
    """Build an autoencoder of slices (B, 1, H, W) in [-1, 1], after Rombach et al. 2022 (arXiv:2112.10752),
    section 3.1; latents are (B, latent_channels, H / f, W / f), f = patch_size · 2^(len(widths) - 1).

    Its latents are not normalized yet: `train_vae.py` measures `latents_mean` and `latents_std` at its end,
    and writes them into the config. `scaling_factor` stays 1, so that these two are the whole normalization.
    Raises UserError if `image_size` is not a multiple of f.
    """
    factor = patch_size * 2 ** (len(widths) - 1)
    if image_size % factor:
        raise UserError(
            f"image_size={image_size} is not a multiple of {factor}, the patch size times 2 for each level "
            "but the first: choose one, or fewer widths"
        )
    vae = SliceAutoencoder(
        in_channels=patch_size**2,
        out_channels=patch_size**2,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=math.gcd(32, *widths),
        sample_size=image_size,
        scaling_factor=1.0,
        mid_block_add_attention=mid_attention,
    )
    vae.register_to_config(_patch_size=patch_size)
    return vae


def latent_shape(vae: SliceAutoencoder, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of slices (1, image_size, image_size).

    Raises UserError if `image_size` is not a multiple of the autoencoder's downsampling factor.
    """
    factor = vae.downsampling
    if image_size % factor:
        raise UserError(
            f"--image_size {image_size} must be a multiple of {factor}, this VAE's downsampling factor"
        )
    return vae.config.latent_channels, image_size // factor, image_size // factor


class ReconstructingVAE(nn.Module):
    """The autoencoder as a module that returns the reconstruction and the posterior, for training.

    `AutoencoderKL.forward` does not return the posterior, and calling its parts would bypass the wrapper that
    averages gradients across processes. `decode_in_float32`, without autocast, is required under fp16, which
    overflows in the decoder.
    """

    def __init__(self, vae: SliceAutoencoder, decode_in_float32: bool = False):
        super().__init__()
        self.vae = vae
        self.decode_in_float32 = decode_in_float32

    def forward(
        self, images: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map slices (B, 1, H, W) in [-1, 1] and standard normal noise (B, C, h, w) to reconstructions
        (B, 1, H, W), and the posterior's mean and log-variance (B, C, h, w)."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        with torch.autocast(images.device.type, enabled=False) if self.decode_in_float32 else nullcontext():
            if self.decode_in_float32:
                latents = latents.float()
            reconstruction = self.vae.decode(latents, return_dict=False)[0]
        return reconstruction, posterior.mean, posterior.logvar
