"""The training set as latents: encoded once, drawn anew each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm


@dataclass(frozen=True)
class LatentPosteriors:
    """Posterior N(mean, std²) of each slice, as the VAE encodes it (not normalized).

    The spread is kept, not one draw of it: a draw frozen into the cache is noise that no denoiser can
    remove, and sets a floor under the loss.
    """

    mean: torch.Tensor  # (N, C, h, w)
    std: torch.Tensor  # (N, C, h, w)
    labels: torch.Tensor  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, indices: list[int], noise: torch.Tensor) -> torch.Tensor:
        """A latent of each slice asked for, (B, C, h, w), from standard normal noise of that shape."""
        return self.mean[indices] + self.std[indices] * noise

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel of latents drawn from all posteriors.

        Var z = Var μ + E σ² (law of total variance), in float64.
        """
        mean, std = self.mean.double(), self.std.double()
        variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))
        return mean.mean(dim=(0, 2, 3)).tolist(), variance.sqrt().tolist()


@torch.no_grad()
def encode_posteriors(
    vae: AutoencoderKL, slices: Dataset, batch_size: int, accelerator: Accelerator
) -> LatentPosteriors:
    """Encode every slice in float32, each process its share; all processes get the whole.

    Args:
        vae: on the accelerator's device.
        slices: yields {"image": (1, H, W) in [-1, 1], "label": int}.
    """
    total, share = len(slices), -(-len(slices) // accelerator.num_processes)
    first = share * accelerator.process_index
    # the last process may run over the end: it encodes the last slice again, and the copies are cut off below
    indices = [min(index, total - 1) for index in range(first, first + share)]
    loader = DataLoader(Subset(slices, indices), batch_size=batch_size)
    means, stds, labels = [], [], []
    for batch in tqdm(loader, desc="encoding slices", disable=not accelerator.is_main_process, leave=False):
        images = batch["image"].to(accelerator.device, torch.float32)  # (B, 1, H, W)
        posterior = vae.encode(images).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
        labels.append(batch["label"].to(accelerator.device))
    whole = [accelerator.gather(torch.cat(parts))[:total] for parts in (means, stds, labels)]
    return LatentPosteriors(*whole)
