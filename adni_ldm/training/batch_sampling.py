"""Which slices a batch holds and which random numbers it uses: functions of (seed, batch number) alone.

Nothing here has state. A resumed run therefore repeats the uninterrupted one, and N processes of batch size b
see exactly what one process of batch size N·b sees, each its own rows of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from adni_ldm.training.update_guard import ignore_stop_signals


@lru_cache(maxsize=4)
def _epoch_order(num_images: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_images)


@dataclass(frozen=True)
class BatchSampler(Sampler[list[int]]):
    """Indices of the slices in batches `start` to `stop`, this process's rows of them.

    Epochs follow each other without a gap: each slice comes once an epoch, even if `num_images` is not a
    multiple of the batch size, so no slice is lost and no process runs out before the others.
    """

    num_images: int
    batch_size: int  # rows of one process
    seed: int
    start: int
    stop: int
    process: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, self.stop):
            first = (batch * self.num_processes + self.process) * self.batch_size
            yield [self._slice_at(position) for position in range(first, first + self.batch_size)]

    def _slice_at(self, position: int) -> int:
        epoch, place = divmod(position, self.num_images)
        return int(_epoch_order(self.num_images, epoch, self.seed)[place])


def load_batches(
    slices: Dataset, sampler: BatchSampler, device: torch.device, num_workers: int, channels_last: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of a sampler on the device: {"image": (B, 1, H, W) in [-1, 1], "label": (B,)}."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    loader = DataLoader(
        slices,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=device.type == "cuda",  # else a copy to the GPU waits for it
    )
    for batch in loader:
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        yield batch | {"image": batch["image"].contiguous(memory_format=layout)}


class BatchRandom:
    """Random tensors of one batch, sampled for all processes at once; each process keeps its rows.

    Sampling the other processes' rows as well takes microseconds and makes a run independent of the number
    of processes. Streams differ between kinds of device, as torch's generators do.
    """

    def __init__(
        self, seed: int, batch: int, batch_size: int, process: int, num_processes: int, device: torch.device
    ):
        state = int(np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        self.device = torch.device(device)
        self.generator = torch.Generator(device).manual_seed(state)
        # On the host for what indexes memory there; on a CPU run it is the same stream.
        self._host = self.generator if self.device.type == "cpu" else torch.Generator().manual_seed(state)
        self.total = batch_size * num_processes
        self.rows = slice(process * batch_size, (process + 1) * batch_size)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal (B, *shape)."""
        return torch.randn(self.total, *shape, generator=self.generator, device=self.device)[self.rows]

    def uniform(self) -> torch.Tensor:
        """Uniform in [0, 1), (B,)."""
        return torch.rand(self.total, generator=self.generator, device=self.device)[self.rows]

    def integers(self, high: int) -> torch.Tensor:
        """Integers in [0, high), (B,)."""
        return torch.randint(high, (self.total,), generator=self.generator, device=self.device)[self.rows]

    def host_integers(self, high: int) -> torch.Tensor:
        """Integers in [0, high), (B,), on the CPU whatever the device."""
        return torch.randint(high, (self.total,), generator=self._host)[self.rows]
