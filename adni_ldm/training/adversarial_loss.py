"""A discriminator beside the autoencoder, and how much it weighs.

After Esser et al. 2021 (VQGAN, arXiv:2012.09841), section 3.1: it looks at patches, and its weight follows
the gradients, so that it never outweighs what makes reconstructions like the slices.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from adni_ldm.errors import UserError


class Discriminator(nn.Module):
    """MONAI's patch discriminator: slices (B, 1, H, W) in [-1, 1] to one score a patch, (B, 1, h, w).

    Its usual BatchNorm would make a score depend on the other slices of the process: two processes of batch b
    would not take the step of one of 2b. GroupNorm looks at one slice alone.

    Args:
        width: channels of the first layer, a multiple of 4; each layer doubles them.
        layers: with three a score sees 70 x 70 pixels (Isola et al. 2017, arXiv:1611.07004).
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        from monai.networks.nets.patchgan_discriminator import PatchDiscriminator  # slow to import

        norm = ("GROUP", {"num_groups": 8})
        self.network = PatchDiscriminator(
            spatial_dims=2, in_channels=1, channels=width, num_layers_d=layers, norm=norm
        )
        # λ for the next update. Here, since the weights' file of a checkpoint keeps it for a resumed run.
        self.register_buffer("balance", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[-1]


class Adversary:
    """The two sides' losses for each batch, and the weight λ between them for each update.

    λ = ‖∇ L_rec‖ / (‖∇ L_gan‖ + δ) at the weight of the decoder's last layer (equation 7). The gradients are
    averages over all processes and accumulated batches, as those of the update are: so λ does not depend on
    how the batch is shared out. They are known once the last batch is through, and λ is that of the update
    before; in the discriminator's first update it is 0.

    Args:
        discriminator: the module itself.
        prepared: what `accelerator.prepare` made of it.
        last_layer: weight of the decoder's last layer.
        weight: factor on λ.
    """

    DELTA, LARGEST = 1e-6, 1e4

    def __init__(
        self,
        accelerator: Accelerator,
        discriminator: Discriminator,
        prepared: nn.Module,
        last_layer: nn.Parameter,
        weight: float,
    ):
        from monai.losses.adversarial_loss import PatchAdversarialLoss  # slow to import

        self.accelerator, self.discriminator, self.prepared = accelerator, discriminator, prepared
        self.last_layer, self.weight = last_layer, weight
        # Least squares (Mao et al. 2017, arXiv:1611.04076): means over patches, alike for any batch.
        self.score = PatchAdversarialLoss(criterion="least_squares", no_activation_leastsq=True)
        self.gradients: list[torch.Tensor] = []  # of this update's batches: (2, *last_layer.shape)

    def losses(
        self, images: torch.Tensor, reconstruction: torch.Tensor, likeness: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the autoencoder's loss gains, weighted, and the discriminator's loss, for one backward pass.

        Args:
            images, reconstruction: (B, 1, H, W).
            likeness: the autoencoder's loss that says how like the two are, without the KL.
        """
        # The autoencoder's side. The discriminator is held still, and its wrapper waits for no gradient.
        self.discriminator.requires_grad_(False)
        with self.accelerator.no_sync(self.prepared):
            fooled = self.score(self.prepared(reconstruction), target_is_real=True, for_discriminator=False)
        self.discriminator.requires_grad_(True)
        self.gradients.append(torch.stack([self._gradient(likeness), self._gradient(fooled)]))

        # The discriminator's side, in one pass: a wrapper takes one forward for each backward.
        both = self.prepared(torch.cat([images, reconstruction.detach()]))
        real, drawn = (
            self.score(scores, target_is_real=is_real, for_discriminator=True)
            for scores, is_real in zip(both.chunk(2), (True, False))
        )
        return self.weight * self.discriminator.balance.clone() * fooled, (real + drawn) / 2

    def end_update(self, max_grad_norm: float) -> torch.Tensor:
        """Set λ for the next update, clip the discriminator's gradients; returns their norm.

        After `accelerator.clip_grad_norm_` of the autoencoder's, which takes the gradient scaling off both.
        """
        mean = self.accelerator.reduce(torch.stack(self.gradients).mean(dim=0), "mean")
        self.gradients.clear()
        balance = adaptive_weight(*mean, self.DELTA, self.LARGEST)
        # a batch that is not finite is not learned from
        self.discriminator.balance.copy_(torch.where(balance.isfinite(), balance, self.discriminator.balance))
        return nn.utils.clip_grad_norm_(self.discriminator.parameters(), max_grad_norm)

    def _gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradient at the last layer, scaled on its way as fp16 needs it."""
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler else 1.0
        (gradient,) = torch.autograd.grad(loss * scale, self.last_layer, retain_graph=True)
        return gradient.float() / scale


def adaptive_weight(
    of_likeness: torch.Tensor, of_adversary: torch.Tensor, delta: float = 1e-6, largest: float = 1e4
) -> torch.Tensor:
    """λ = ‖∇ L_rec‖ / (‖∇ L_gan‖ + δ), at most `largest`, of the two gradients at the last layer.

    Esser et al. 2021 (arXiv:2012.09841), equation 7.
    """
    return (of_likeness.norm() / (of_adversary.norm() + delta)).clamp(max=largest)


def refuse_sharding(accelerator: Accelerator, weight: float) -> None:
    """Refuse a discriminator where a launcher takes one network alone.

    Raises:
        UserError: under FSDP or DeepSpeed.
    """
    kind = accelerator.distributed_type
    if weight and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"--discriminator_weight {weight}: {kind.value} trains one network at a time; give "
            "--discriminator_weight 0, or take accelerate_config.yaml: a VAE needs no sharding"
        )
