"""Shared by the methods of baselines.py: batches until the time limit, and the result of training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from measure import DEVICE

from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.precision import choose_precision


@dataclass(frozen=True)
class Trained:
    """A trained method as functions of slices in [-1, 1]."""

    reconstruct: Callable[[torch.Tensor], torch.Tensor]  # (B, 1, H, W)
    sample: Callable[[torch.Tensor], torch.Tensor]  # labels (B,) to slices (B, 1, H, W), on the CPU
    seconds: float  # of training
    note: str


def batches(train: ImageSet, batch_size: int, seconds: float) -> Iterator[tuple]:
    """Yield slices (B, 1, H, W) in [-1, 1], labels (B,) and the elapsed fraction of the time, until it is 1.

    Slices are shuffled each epoch and kept in memory, so that no method waits for the disk.
    """
    started = time.perf_counter()
    while True:
        for rows in torch.randperm(len(train)).split(batch_size):
            elapsed = time.perf_counter() - started
            if elapsed >= seconds:  # also where no time is left at all
                return
            labels = torch.from_numpy(train.labels[rows.numpy()])
            yield train.floats(rows).to(DEVICE), labels.to(DEVICE), elapsed / seconds


def in_half(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a function so that it computes in half precision and returns float32."""

    def call(*arguments, **named) -> torch.Tensor:
        with half_precision():
            return function(*arguments, **named).float()

    return call


def half_precision() -> AbstractContextManager:
    """Autocast to bfloat16 where the hardware supports it."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if choose_precision(None) == "bf16" else nullcontext()
