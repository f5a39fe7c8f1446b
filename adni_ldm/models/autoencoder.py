"""The autoencoder (VAE): slices to latents and back."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from diffusers import AutoencoderKL
from torch import nn

from adni_ldm.errors import UserError


def build_autoencoder(
    image_size: int,  # side of the square slice
    latent_channels: int = 4,
    widths: Sequence[int] = (64, 128, 256, 256),  # channels per level; each level but one halves
    layers_per_block: int = 1,
    mid_attention: bool = False,  # self-attention at the coarsest level: (h·w)² memory, little gain
) -> AutoencoderKL:
    """Build an autoencoder of slices (B, 1, H, W) in [-1, 1], after Rombach et al. 2022 (arXiv:2112.10752),
    section 3.1; latents are (B, latent_channels, H / f, W / f), f = 2^(len(widths) - 1).

    Its latents are not normalized yet: `train_vae.py` measures `latents_mean` and `latents_std` at its end,
    and writes them into the config. `scaling_factor` stays 1, so that these two are the whole normalization.
    Raises UserError if `image_size` cannot be halved once per level.
    """
    if image_size % 2 ** (len(widths) - 1):
        raise UserError(
            f"image_size={image_size} cannot be halved {len(widths) - 1} times: "
            f"choose a multiple of {2 ** (len(widths) - 1)}, or fewer widths"
        )
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
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


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, h, w) of the latents of slices (1, image_size, image_size).

    Raises UserError if `image_size` is not a multiple of the autoencoder's downsampling factor.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
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

    def __init__(self, vae: AutoencoderKL, decode_in_float32: bool = False):
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
