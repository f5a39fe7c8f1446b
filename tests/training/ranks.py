"""What two processes compute, for test_processes.py: started there by `accelerate launch`.

    python tests/training/ranks.py OUTPUT_DIR MIXED_PRECISION

Writes the averaged gradients of both recipes' modules, and what the processes agreed on, of the main process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch.utils.data import Dataset

from adni_ldm.models.autoencoder import ReconstructingVAE, build_autoencoder
from adni_ldm.models.class_embedding import ClassEmbedding
from adni_ldm.models.denoiser import ConditionalDenoiser, build_denoiser
from adni_ldm.training.adversarial_loss import AdversarialLoss, PatchDiscriminator
from adni_ldm.training.batch_sampling import BatchRandom
from adni_ldm.training.latents import LatentPosteriors, encode_posteriors
from adni_ldm.training.launch import start_accelerator
from adni_ldm.training.losses import (
    diffusion_loss,
    kl_divergence,
    reconstruction_loss,
    spectral_loss,
)
from adni_ldm.training.update_guard import UpdateGuard

TOTAL = 8  # rows of an update, over all processes and accumulated batches


def build(which: str) -> torch.nn.Module:
    """The module that a recipe trains, small, with the same weights on every process."""
    torch.manual_seed(0)
    if which == "vae":
        return ReconstructingVAE(build_autoencoder(16, widths=(8, 16)))
    return ConditionalDenoiser(build_denoiser(4, 8, (32, 32), 16, 1), ClassEmbedding(token_dim=16))


def loss_of(which: str, model: torch.nn.Module, rows: slice) -> torch.Tensor:
    """The recipe's loss on some rows of one fixed batch of 8."""
    noise = BatchRandom(0, 0, TOTAL, 0, 1, torch.device("cpu"))
    if which == "vae":
        images, draws = noise.normal(1, 16, 16).tanh(), noise.normal(4, 8, 8)
        reconstruction, mean, logvar = model(images[rows], draws[rows])
        return reconstruction_loss(reconstruction, images[rows], "l2") + 0.1 * kl_divergence(mean, logvar)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    clean, draws = noise.normal(4, 8, 8)[rows], noise.normal(4, 8, 8)[rows]
    timesteps, labels = noise.integers(1000)[rows], noise.integers(3)[rows]
    prediction = model(scheduler.add_noise(clean, draws, timesteps), timesteps, labels)
    return diffusion_loss(prediction, clean, draws, timesteps, scheduler, 5.0)


def gradients(accelerator, which: str, accumulation: int) -> dict[str, torch.Tensor]:
    """Gradients of one update, each process and accumulated batch with its rows."""
    model = accelerator.prepare(build(which))
    size = TOTAL // (accelerator.num_processes * accumulation)
    for batch in range(accumulation):
        first = (batch * accelerator.num_processes + accelerator.process_index) * size
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(which, model, slice(first, first + size)))
    module = accelerator.unwrap_model(model)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    return {f"{which}.{name}": parameter.grad.clone() for name, parameter in module.named_parameters()}


def agreements(accelerator) -> dict[str, list]:
    """What each process decides where the last one alone meets a NaN, an infinite gradient, and SIGTERM."""
    guard = UpdateGuard(accelerator, max_nonfinite=2)
    guard.listen()
    alone = accelerator.process_index == accelerator.num_processes - 1
    good, decisions = torch.tensor(1.0), []
    for loss, norm in ((good, good), (good / 0 * 0, good), (good, good / 0), (good, good)):
        guard.add(loss if alone else good)
        guard.check(norm if alone else good)
        decisions.append(guard.settle())
        decisions.append(guard.exhausted)
    if alone:
        os.kill(os.getpid(), signal.SIGTERM)
    guard.add(good)
    guard.check(good)
    guard.settle()
    return {"decisions": decisions, "skipped": guard.skipped, "stop": guard.stop}


def opposed(accelerator, accumulation: int) -> dict[str, torch.Tensor]:
    """Gradients of autoencoder and discriminator in the second update, and the weight between them.

    In the first one that is measured. No step is taken, so both updates are of the same weights.
    """
    network, discriminator = build("vae"), PatchDiscriminator(width=8, layers=2)
    model, prepared = accelerator.prepare(network, discriminator)
    adversarial_loss = AdversarialLoss(
        accelerator, discriminator, prepared, network.vae.decoder.conv_out.weight, 0.5
    )
    size = TOTAL // (accelerator.num_processes * accumulation)
    noise = BatchRandom(0, 0, TOTAL, 0, 1, torch.device("cpu"))
    images, draws = noise.normal(1, 16, 16).tanh(), noise.normal(4, 8, 8)
    for _ in range(2):
        network.zero_grad(), discriminator.zero_grad()
        for batch in range(accumulation):
            first = (batch * accelerator.num_processes + accelerator.process_index) * size
            rows = slice(first, first + size)
            with accelerator.accumulate(model, prepared):
                reconstruction, _, _ = model(images[rows], draws[rows])
                rec_loss = reconstruction_loss(reconstruction, images[rows], "l1")
                rec_loss = rec_loss + spectral_loss(reconstruction, images[rows])
                g_loss, d_loss = adversarial_loss(images[rows], reconstruction, rec_loss)
                accelerator.backward(rec_loss + g_loss + d_loss)
        adversarial_loss.end_update()
    found = {"gan.d_weight": discriminator.d_weight}
    for part in (network, discriminator):
        found |= {f"gan.{name}": weight.grad.clone() for name, weight in part.named_parameters()}
    return found


class Slices(Dataset):
    """Forty slices: over two processes no whole number of what is encoded together."""

    labels = torch.arange(40) % 2

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(index)) * 2 - 1}


def cached(accelerator, folder: Path) -> LatentPosteriors:
    """Latents of all slices and a variant of each, by way of a cache."""
    return encode_posteriors(build("vae").vae, Slices(), accelerator, folder, "slices", variants=1)


def main(output_dir: Path, precision: str) -> None:
    accelerator = start_accelerator(output_dir, precision, 2, "none", seed=0)
    cached(accelerator, output_dir / "latents")
    found = gradients(accelerator, "vae", 2) | gradients(accelerator, "ldm", 2) | opposed(accelerator, 2)
    agreed = gather_object([agreements(accelerator)])
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        save_file(found, output_dir / "gradients.safetensors")
        (output_dir / "agreed.json").write_text(json.dumps(agreed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
