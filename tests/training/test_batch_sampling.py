"""Order of the slices and noise of a batch: functions of (seed, batch) alone."""

import torch

from adni_ldm.training.batch_sampling import BatchRandom, BatchSampler

CPU = torch.device("cpu")


def test_each_slice_comes_once_an_epoch_also_where_batches_do_not_divide_it():
    places = [index for batch in BatchSampler(10, 4, seed=0, start=0, stop=10) for index in batch]
    epochs = [places[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1], "every epoch has an order of its own"


def test_processes_share_the_batch_of_one():
    one = list(BatchSampler(10, 6, seed=1, start=0, stop=5))
    shares = [list(BatchSampler(10, 2, 1, 0, 5, process, 3)) for process in range(3)]
    assert [sum(parts, []) for parts in zip(*shares)] == one


def test_a_resumed_order_goes_on_where_it_stopped():
    whole = list(BatchSampler(10, 4, seed=2, start=0, stop=9))
    assert list(BatchSampler(10, 4, seed=2, start=5, stop=9)) == whole[5:]
    assert list(BatchSampler(10, 4, seed=3, start=0, stop=9)) != whole


def test_processes_share_the_noise_of_one():
    one = BatchRandom(0, 7, 6, 0, 1, CPU)
    shares = [BatchRandom(0, 7, 2, process, 3, CPU) for process in range(3)]
    assert torch.equal(torch.cat([share.normal(4, 8) for share in shares]), one.normal(4, 8))
    assert torch.equal(torch.cat([share.uniform() for share in shares]), one.uniform())
    assert torch.equal(torch.cat([share.integers(1000) for share in shares]), one.integers(1000))


def test_noise_differs_between_batches_and_seeds():
    draws = [BatchRandom(seed, batch, 2, 0, 1, CPU).normal(8) for seed in (0, 1) for batch in (0, 1)]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))
