"""First step of `make demo`: how long it will take on this machine, from a few timed updates of its networks.

python examples/demo_estimate.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from adni_ldm.models import ClassEmbedding, ConditionalDenoiser, build_autoencoder, build_denoiser
from adni_ldm.precision import choose_precision, has_bf16
from adni_ldm.training.calibration import FITTED, LEVELS
from adni_ldm.training.optimizer import build_optimizer

SAMPLES, STEPS, BATCH = 128, 50, 16  # both classes of `make demo`, a model's own steps, a batch
OTHER_SECONDS = 120  # the cohort, starts of five commands, latents, validation and figures
TIMED = 8  # updates, after two that are not counted


def main() -> None:
    vae, ldm = (yaml.safe_load(Path(f"configs/demo/{name}.yaml").read_text()) for name in ("vae", "ldm"))
    size, widths, patch = vae["image_size"], vae["widths"], vae["patch_size"]
    autoencoder = build_autoencoder(size, vae["latent_channels"], widths, patch_size=patch)
    latent = size // (patch * 2 ** (len(widths) - 1))
    unet = build_denoiser(
        vae["latent_channels"],
        latent,
        ldm["unet_widths"],
        layers_per_block=ldm["layers_per_block"],
        attention_levels=ldm["attention_levels"],
    )
    denoiser = ConditionalDenoiser(unet, ClassEmbedding())

    slices = torch.randn(vae["batch_size"], 1, size, size)
    latents = torch.randn(ldm["batch_size"], vae["latent_channels"], latent, latent)
    timesteps, labels = torch.randint(1000, (BATCH,)), torch.zeros(BATCH, dtype=torch.long)

    def reconstruct() -> torch.Tensor:
        return (autoencoder(slices, sample_posterior=True).sample - slices).abs().mean()

    def denoise() -> torch.Tensor:
        return denoiser(latents, timesteps, labels).square().mean()

    seconds = {
        "autoencoder": vae["max_steps"] * seconds_of(training_step(autoencoder, vae, reconstruct)),
        "diffusion model": ldm["max_steps"] * seconds_of(training_step(denoiser, ldm, denoise)),
    }
    with torch.no_grad():
        passes = seconds_of(with_autocast(denoise))
        seconds["diffusion model"] += len(LEVELS) * FITTED / BATCH * passes
        seconds["samples"] = STEPS * SAMPLES / BATCH * passes
    seconds["everything else"] = OTHER_SECONDS
    parts = ", ".join(f"{name} {value / 60:.0f}" for name, value in seconds.items())
    machine = f"{torch.get_num_threads()} threads, {'with' if has_bf16() else 'without'} bf16 instructions"
    minutes = sum(seconds.values()) / 60
    print(f"make demo takes about {minutes:.0f} minutes on this machine ({machine}): {parts}", flush=True)


def training_step(model: torch.nn.Module, preset: dict, loss_of: Callable) -> Callable[[], None]:
    """An update of a model by the preset's optimizer."""
    decay = preset.get("weight_decay", 0.01)
    optimizer = build_optimizer(preset["optimizer"], model.parameters(), preset["learning_rate"], decay)
    forward = with_autocast(loss_of)

    def step() -> None:
        forward().float().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_autocast(call: Callable) -> Callable:
    """The call in the precision that the recipes choose on this processor."""

    def inner():
        with torch.autocast("cpu", torch.bfloat16, enabled=choose_precision(None) == "bf16"):
            return call()

    return inner


def seconds_of(call: Callable) -> float:
    """Median time of a call."""
    seconds = []
    for _ in range(TIMED + 2):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    main()
