"""The denoiser: a U-Net over latents that reads class tokens by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.models.class_embedding import ClassEmbedding


def build_denoiser(
    latent_channels: int,
    latent_size: int,  # side of the square latent
    widths: Sequence[int] = (128, 256, 384, 512),  # channels per level, fine to coarse
    token_dim: int = 256,  # width of the class tokens that cross-attention reads
    layers_per_block: int = 2,
    head_dim: int = 32,  # channels of one attention head
) -> UNet2DConditionModel:
    """Denoiser for latents (B, C, h, w), after Rombach et al. 2022 (arXiv:2112.10752), section 3.3.

    Every level but the finest attends: there attention costs most, (h·w)², and convolution sees enough.

    Raises:
        UserError: the latent cannot be halved as often as there are levels, or a width has no whole
            number of heads or of groups of 32.
    """
    halvings = len(widths) - 1
    if latent_size % 2**halvings:
        raise UserError(
            f"latent_size={latent_size} cannot be halved {halvings} times: "
            f"give fewer unet_widths, or an image_size whose latent is a multiple of {2**halvings}"
        )
    if uneven := [width for width in widths if width % 32 or width % head_dim]:
        raise UserError(f"widths {uneven} are not multiples of 32 and of head_dim={head_dim}")
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * halvings,
        up_block_types=("CrossAttnUpBlock2D",) * halvings + ("UpBlock2D",),
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        cross_attention_dim=token_dim,
        # diffusers' historical naming: this argument is the number of heads, not their width
        attention_head_dim=tuple(width // head_dim for width in widths),
    )


class ConditionalDenoiser(nn.Module):
    """U-Net and class embedding as the one module that is trained.

    One module means one gradient average, one EMA and one checkpoint, and it is all that DeepSpeed takes.
    """

    def __init__(self, unet: UNet2DConditionModel, class_embedding: ClassEmbedding):
        super().__init__()
        self.unet = unet
        self.class_embedding = class_embedding

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Noisy latents (B, C, h, w), timesteps (B,) and labels (B,) to the prediction (B, C, h, w)."""
        tokens = self.class_embedding(labels)  # (B, 2, D)
        return self.unet(noisy, timesteps, encoder_hidden_states=tokens, return_dict=False)[0]
