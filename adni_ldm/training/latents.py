"""Latent cache: the posteriors of the training set, encoded once, kept on disk and sampled at every step.

    latents = encode_posteriors(vae, slices, accelerator, cache="runs/latents", content="3f0c…")
    latents[[17, 4]].sample(rng)                    # two latents; other random numbers give others

The cache has one folder for each combination of encoder weights, slices and settings, named by their hash:
another encoder or another cohort has another folder, and later runs read the same ones.

    KEY/posteriors.npy      float32 (variants, N, 2, C, h, w): mean and standard deviation; memory-mapped
    KEY/latents.json        labels, the channels' statistics, and the SHA-256 of both; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import AutoencoderKL
from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from adni_ldm.errors import UserError
from adni_ldm.files import commit_folder, find_damage
from adni_ldm.generation import hash_weights
from adni_ldm.models.autoencoder import latent_shape
from adni_ldm.training.batch_sampling import BatchRandom

RECORD = "latents.json"
# Slices that are encoded together. Always the same ones, and the last chunk is padded: the bits of the cache
# then depend neither on the recipe's batch size nor on the number of processes.
CHUNK = 16
# Range of an augmented variant: small enough to pass for another scan of the subject. There is no flip: left
# and right in a sagittal slice are the front and the back of the brain.
MAX_DEGREES, MAX_SHIFT, MAX_GAIN = 5.0, 0.03, 0.1


@dataclass(frozen=True)
class LatentBatch:
    """Posteriors of the slices of one batch."""

    posteriors: torch.Tensor  # (variants, N, 2, C, h, w), of all slices
    indices: torch.Tensor  # (B,), on the posteriors' device
    labels: torch.Tensor  # (B,), on the device that trains
    conditions: torch.Tensor | None = None  # (B, K), likewise; NaN where missing

    def sample(self, rng: BatchRandom) -> torch.Tensor:
        """Sample a latent of each slice, z = μ + σ ε (B, C, h, w), of a random variant; not normalized."""
        variants, rows = len(self.posteriors), self.indices
        chosen = rng.host_integers(variants) if variants > 1 else torch.zeros(len(rows), dtype=torch.int64)
        chosen = self.posteriors[_to(chosen, rows.device), rows]
        mean, std = _to(chosen, self.labels.device).unbind(1)
        return mean + std * rng.normal(*mean.shape[1:])


@dataclass(frozen=True)
class LatentPosteriors:
    """Posterior N(mean, std²) of each slice, as the VAE encodes it (not normalized).

    The standard deviation is kept, not a single sample: a sample frozen in the cache is noise that no
    denoiser can remove, and bounds the loss from below.
    """

    posteriors: torch.Tensor  # (variants, N, 2, C, h, w): mean and std; variant 0 is the slice as it is
    labels: torch.Tensor  # (N,), on the device that trains
    sha256: str = ""  # of the file they come from
    mean: Sequence[float] = ()  # of each channel over all slices, (C,)
    std: Sequence[float] = ()
    conditions: torch.Tensor | None = None  # (N, K), on the device that trains; NaN where missing
    subjects: np.ndarray | None = None  # str (N,); None: each slice is of another

    @classmethod
    def open(cls, folder: Path, device: torch.device) -> LatentPosteriors:
        """Open a cache: in the GPU's memory if it takes at most a quarter of what is free, else mapped.

        A mapped cache takes no memory of the process; a batch reads its rows alone.
        """
        record = json.loads((folder / RECORD).read_text())
        # "c": no write reaches the file
        posteriors = torch.from_numpy(np.load(folder / "posteriors.npy", mmap_mode="c"))
        if device.type == "cuda" and posteriors.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
            posteriors = posteriors.to(device)
        labels = torch.tensor(record["labels"], device=device)
        return cls(posteriors, labels, record["sha256"], record["mean"], record["std"])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> LatentBatch:
        """The batch of the slices at `indices`."""
        rows = torch.as_tensor(indices)
        labels = self.labels[_to(rows, self.labels.device)]
        conditions = None if self.conditions is None else self.conditions[_to(rows, self.conditions.device)]
        return LatentBatch(self.posteriors, _to(rows, self.posteriors.device), labels, conditions)


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, without waiting for a GPU: pageable memory would be copied synchronously."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def latent_encoder(vae: AutoencoderKL) -> nn.ModuleDict:
    """The parts of the VAE that latents depend on, which --decoder_only freezes."""
    return nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})


def encode_posteriors(
    vae: AutoencoderKL,
    slices: Dataset,
    accelerator: Accelerator,
    cache: str | Path | None,
    content: str,
    variants: int = 0,
) -> LatentPosteriors:
    """Load the posteriors of all slices from the cache, or encode them into it. Every process calls it.

    Args:
        vae: on the accelerator's device.
        slices: of {"image": (1, H, W) in [-1, 1]}, with `labels`, int64 (N,), `subjects` (N,) if known, and
            `condition_rows` of a model with conditions; images are read only if not in the cache.
        cache: folder of caches, on a disk that all processes share; None: adni_ldm/latents in HF_HOME.
        content: hash of the slices; that of the main process is used.
        variants: number of augmented variants of each slice, kept beside it.

    Raises UserError if the cache cannot be written, or a process cannot see it.
    """
    folder = Path(cache or Path(HF_HOME, "adni_ldm", "latents")).expanduser().absolute()
    key, missing, problems = "", True, []
    lock = nullcontext()
    if accelerator.is_main_process:
        key = _key(vae, slices, content, variants, accelerator.device)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Another run may be writing the same cache: wait for it, and read what it wrote.
            lock = FileLock(folder / f"{key}.lock").acquire()
            missing = find_damage(folder / key, RECORD) is not None
            if missing:
                shutil.rmtree(folder / f"{key}.partial", ignore_errors=True)  # left by a kill
                (folder / f"{key}.partial").mkdir(mode=0o700)  # latents can be decoded to the slices
        except OSError as error:
            problems.append(str(error))
    with lock:
        key, missing, problems = broadcast_object_list([key, missing, problems])
        target, partial = folder / key, folder / f"{key}.partial"
        if not problems and not all(gather_object([(partial if missing else target).is_dir()])):
            problems = ["some process cannot see it"]
        if missing and not problems:
            problems = _write(vae, slices, accelerator, partial, target, variants)
    if problems:
        raise UserError(
            f"--latent_cache {folder}: {problems[0]}; give a folder with free space that all processes share"
        )
    opened, rows = LatentPosteriors.open(target, accelerator.device), getattr(slices, "condition_rows", None)
    conditions = None if rows is None else rows.to(accelerator.device)
    return dataclasses.replace(opened, conditions=conditions, subjects=getattr(slices, "subjects", None))


def _write(
    vae: AutoencoderKL,
    slices: Dataset,
    accelerator: Accelerator,
    partial: Path,
    target: Path,
    variants: int,
) -> list[str]:
    """Encode the slices and let the main process write them; returns the problems, alike on all processes."""
    shape = (1 + variants, len(slices), 2, *latent_shape(vae, slices[0]["image"].shape[-1]))
    problems: list[str] = []
    with (partial / "posteriors.npy").open("wb") if accelerator.is_main_process else nullcontext() as file:
        if file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        batches = encode_slices(vae, slices, accelerator, variants)
        mean, std = channel_statistics(_saved(batches, file, problems))
    if accelerator.is_main_process and not problems:
        record = {"mean": mean, "std": std, "labels": slices.labels.tolist()}
        try:
            commit_folder(partial, target, RECORD, record)
        except OSError as error:
            problems.append(str(error))
    if problems:
        shutil.rmtree(partial, ignore_errors=True)
    return broadcast_object_list([problems])[0]


def _saved(
    batches: Iterable[torch.Tensor], file: BinaryIO | None, problems: list[str]
) -> Iterator[torch.Tensor]:
    """Yield each batch once it is written; on a full disk too, because other processes still take part."""
    for posteriors in batches:
        if file and not problems:
            try:
                file.write(posteriors.cpu().numpy().tobytes())
            except OSError as error:
                problems.append(str(error))
        yield posteriors


def encode_slices(
    vae: AutoencoderKL, slices: Dataset, accelerator: Accelerator, variants: int = 0
) -> Iterator[torch.Tensor]:
    """Mean and standard deviation of the slices' posteriors, (n, 2, C, h, w), float32, in their order.

    Each process encodes its share and receives all: the slices as they are, then variant 1, and so on.
    """
    total, step = len(slices), CHUNK * accelerator.num_processes
    first = CHUNK * accelerator.process_index
    starts = range(0, total, step)
    # padded with copies of the last slice, which are dropped below
    share = [min(start + first + row, total - 1) for start in starts for row in range(CHUNK)]
    progress = tqdm(
        desc="encoding slices",
        total=(1 + variants) * total,
        disable=not accelerator.is_main_process,
        leave=False,
    )
    for variant in range(1 + variants):
        loader = DataLoader(Subset(slices, share), batch_size=CHUNK)
        for number, (start, batch) in enumerate(zip(starts, loader, strict=True)):
            images = batch["image"].to(accelerator.device, torch.float32)  # (CHUNK, 1, H, W)
            if variant:
                images = augment(images, share[number * CHUNK : (number + 1) * CHUNK], variant)
            with torch.no_grad():  # else a trainable VAE's graph would grow with every slice
                posterior = vae.encode(images).latent_dist
            rows = accelerator.gather(torch.stack([posterior.mean, posterior.std], dim=1).contiguous())
            rows = rows[: total - start]
            progress.update(len(rows))
            yield rows
    progress.close()


def augment(images: torch.Tensor, indices: Sequence[int], variant: int) -> torch.Tensor:
    """Rotate, shift and rescale slices (B, 1, H, W) in [-1, 1] a little, by (variant, index)."""
    draws = np.stack([np.random.default_rng([variant, index]).uniform(-1, 1, 4) for index in indices])
    angle, right, down, gain = torch.tensor(draws, dtype=torch.float32, device=images.device).T  # (B,) each
    angle = torch.deg2rad(MAX_DEGREES * angle)
    cos, sin = angle.cos(), angle.sin()
    rows = (cos, -sin, 2 * MAX_SHIFT * right, sin, cos, 2 * MAX_SHIFT * down)
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return ((moved + 1) * (1 + MAX_GAIN * gain).view(-1, 1, 1, 1) - 1).clamp(-1, 1)


def channel_statistics(batches: Iterable[torch.Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of latents sampled from all posteriors (n, 2, C, h, w).

    Var z = E (μ² + σ²) − (E μ)², in float64.
    """
    count, sums = 0, torch.zeros(())
    for posteriors in batches:
        mean, std = posteriors.double().unbind(1)
        moments = torch.stack([mean, mean.square() + std.square()])  # (2, n, C, h, w)
        sums = sums.to(moments) + moments.sum(dim=(1, 3, 4))  # (2, C)
        count += mean.numel() // mean.shape[1]
    mean, square = sums / count
    return mean.tolist(), (square - mean.square()).sqrt().tolist()


def _key(vae: AutoencoderKL, slices: Dataset, content: str, variants: int, device: torch.device) -> str:
    """Name of the cache folder: the same on every machine of a kind."""
    # What is measured after training, and entries with an underscore, change no posterior.
    measured = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    config = {name: vae.config[name] for name in vae.config if name[0] != "_" and name not in measured}
    # Kinds of device round differently.
    parts = [RECORD, hash_weights(latent_encoder(vae)), config, content, len(slices), variants, device.type]
    parts += [CHUNK, MAX_DEGREES, MAX_SHIFT, MAX_GAIN]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()[:24]
