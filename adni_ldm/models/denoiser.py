"""The denoiser: a U-Net over latents, conditioned on class tokens by cross-attention."""

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.models.class_embedding import ClassEmbedding
from adni_ldm.models.condition_embedding import ConditionEmbedding

HEAD_DIM = 32  # channels of one attention head, and of the groups of group normalization


def build_denoiser(
    latent_channels: int,
    latent_size: int,  # side of the square latent
    widths: Sequence[int] = (128, 256, 384, 512),  # channels per level, fine to coarse
    token_dim: int = 256,  # width of the class tokens
    layers_per_block: int = 2,
    attention_levels: int | None = None,  # coarsest levels with attention; None: all but the finest
) -> UNet2DConditionModel:
    """Build a U-Net for latents (B, C, h, w), after Rombach et al. 2022 (arXiv:2112.10752), section 3.3.

    Unless told otherwise every level but the finest has attention: there its cost, (h·w)², is highest and
    convolution suffices.
    Raises UserError if the latent cannot be halved once per level, or a width is not a multiple of HEAD_DIM.
    """
    halvings = len(widths) - 1
    if latent_size % 2**halvings:
        raise UserError(
            f"latent_size={latent_size} cannot be halved {halvings} times: "
            f"give fewer unet_widths, or an image_size whose latent is a multiple of {2**halvings}"
        )
    if uneven := [width for width in widths if width % HEAD_DIM]:
        raise UserError(f"widths {uneven} are not multiples of {HEAD_DIM}")
    attended = halvings if attention_levels is None else attention_levels
    if not 0 <= attended <= len(widths):
        raise UserError(f"attention_levels={attended}: choose 0 to {len(widths)}, the number of levels")
    plain = len(widths) - attended
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * attended,
        up_block_types=("CrossAttnUpBlock2D",) * attended + ("UpBlock2D",) * plain,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        cross_attention_dim=token_dim,
        # diffusers' historical naming: this argument is the number of heads, not their width
        attention_head_dim=tuple(width // HEAD_DIM for width in widths),
    )


class ConditionalDenoiser(nn.Module):
    """U-Net, class embedding and, of a model with conditions, condition embedding as one module.

    One module has one gradient all-reduce, one EMA and one checkpoint, and DeepSpeed takes no more than one.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        class_embedding: ClassEmbedding,
        condition_embedding: ConditionEmbedding | None = None,
    ):
        super().__init__()
        self.unet = unet
        self.class_embedding = class_embedding
        self.condition_embedding = condition_embedding

    @property
    def parts(self) -> tuple[UNet2DConditionModel, ClassEmbedding, ConditionEmbedding | None]:
        """As a pipeline takes them."""
        return self.unet, self.class_embedding, self.condition_embedding

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor,
        conditions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map noisy latents (B, C, h, w), timesteps (B,), labels (B,) and, of a model with them, conditions
        (B, K), NaN where missing, to the prediction (B, C, h, w)."""
        tokens = self.class_embedding(labels, return_dict=False)[0]  # (B, 2, D)
        if self.condition_embedding is not None:
            tokens = torch.cat([tokens, self.condition_embedding(conditions, return_dict=False)[0]], dim=1)
        return self.unet(noisy, timesteps, encoder_hidden_states=tokens, return_dict=False)[0]
