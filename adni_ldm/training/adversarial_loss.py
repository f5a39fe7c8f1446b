"""Adversarial loss of the autoencoder: a PatchGAN discriminator and its adaptive weight.

After Esser et al. 2021 (VQGAN, arXiv:2012.09841), section 3.1: the discriminator scores patches, and the
weight of its loss follows the gradients, so that it never outweighs the reconstruction loss.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from adni_ldm.errors import UserError


class PatchDiscriminator(nn.Module):
    """MONAI's PatchGAN discriminator: slices (B, 1, H, W) in [-1, 1] to one score per patch, (B, 1, h, w).

    GroupNorm replaces its BatchNorm, with which a score depends on the other slices of the process: two
    processes of batch b would not take the step of one of 2b.

    Args:
        width: channels of the first layer, a multiple of 4; each layer doubles them.
        layers: with three, a score covers 70 x 70 pixels (Isola et al. 2017, arXiv:1611.07004).
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        from monai.networks.nets.patchgan_discriminator import PatchDiscriminator  # slow to import

        norm = ("GROUP", {"num_groups": 8})
        self.network = PatchDiscriminator(
            spatial_dims=2, in_channels=1, channels=width, num_layers_d=layers, norm=norm
        )
        # The adaptive weight of the next update; a buffer, so that a checkpoint keeps it with the weights.
        self.register_buffer("d_weight", torch.zeros(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)[-1]


class AdversarialLoss:
    """Losses of generator and discriminator for each batch, and the adaptive weight for each update.

    λ = ‖∇ L_rec‖ / (‖∇ L_gan‖ + δ) at the weight of the decoder's last layer (equation 7). The gradients are
    averages over all processes and accumulated batches, as those of the update are, so λ does not depend on
    how the batch is distributed. They are complete after the last batch, so λ is that of the previous update;
    in the discriminator's first update it is 0. `prepared` is what `accelerator.prepare` returned for the
    discriminator, `last_layer` the weight of the decoder's last layer, and `weight` a factor on λ.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        discriminator: PatchDiscriminator,
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

    def __call__(
        self, images: torch.Tensor, reconstruction: torch.Tensor, rec_loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Generator loss, weighted, and discriminator loss, for one backward pass of their sum.

        Images and reconstruction are (B, 1, H, W); `rec_loss` has all terms but the KL divergence.
        """
        # The generator's loss. The discriminator is frozen, and its wrapper waits for no gradient.
        self.discriminator.requires_grad_(False)
        with self.accelerator.no_sync(self.prepared):
            scores = self.prepared(reconstruction)
            g_loss = self.score(scores, target_is_real=True, for_discriminator=False)
        self.discriminator.requires_grad_(True)
        self.gradients.append(torch.stack([self._gradient(rec_loss), self._gradient(g_loss)]))

        # The discriminator's loss, in one pass: a wrapper takes one forward pass for each backward pass.
        scores = self.prepared(torch.cat([images, reconstruction.detach()])).chunk(2)
        real, synthetic = (
            self.score(part, target_is_real=is_real, for_discriminator=True)
            for part, is_real in zip(scores, (True, False))
        )
        return self.weight * self.discriminator.d_weight.clone() * g_loss, (real + synthetic) / 2

    def end_update(self) -> None:
        """Set λ for the next update; every process calls it after each update."""
        mean = self.accelerator.reduce(torch.stack(self.gradients).mean(dim=0), "mean")
        self.gradients.clear()
        d_weight = adaptive_weight(*mean)
        # a batch that is not finite leaves the weight as it was
        self.discriminator.d_weight.copy_(
            torch.where(d_weight.isfinite(), d_weight, self.discriminator.d_weight)
        )

    def _gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradient at the last layer, scaled for the backward pass as fp16 needs it."""
        scaler, scale = self.accelerator.scaler, 1.0
        if scaler:
            scale = scaler.scale(torch.ones((), device=loss.device))  # get_scale() would wait for the GPU
        (gradient,) = torch.autograd.grad(loss * scale, self.last_layer, retain_graph=True)
        return gradient.float() / scale


def adaptive_weight(
    rec_gradient: torch.Tensor, g_gradient: torch.Tensor, delta: float = 1e-6, largest: float = 1e4
) -> torch.Tensor:
    """λ = ‖∇ L_rec‖ / (‖∇ L_gan‖ + δ), at most `largest`, of the two gradients at the last layer.

    Esser et al. 2021 (arXiv:2012.09841), equation 7.
    """
    return (rec_gradient.norm() / (g_gradient.norm() + delta)).clamp(max=largest)


def check_adversarial_loss(accelerator: Accelerator, weight: float) -> None:
    """Raise UserError for an adversarial loss under FSDP and DeepSpeed, which train one network at a time."""
    kind = accelerator.distributed_type
    if weight and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError(
            f"--discriminator_weight {weight}: {kind.value} trains one network at a time; give "
            "--discriminator_weight 0, or use accelerate_config.yaml: a VAE needs no sharding"
        )
