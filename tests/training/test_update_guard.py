"""Updates that are not finite are skipped and counted; a signal is answered at the next update."""

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from adni_ldm.errors import UserError
from adni_ldm.training.metrics import MetricsLogger
from adni_ldm.training.update_guard import UpdateGuard, describe_values, stop_nonfinite

GOOD, NAN, INFINITE = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("loss", "norm"), [(NAN, GOOD), (INFINITE, GOOD), (GOOD, NAN), (GOOD, INFINITE)])
def test_what_is_not_finite_does_not_pass(loss, norm, accelerator):
    guard = UpdateGuard(accelerator, max_nonfinite=2)
    guard.add(GOOD)  # of two accumulated batches one is enough
    guard.add(loss)
    assert guard.check(norm) == 1 and guard.settle() is False and not guard.exhausted
    guard.add(GOOD)
    assert guard.check(GOOD) == 0 and guard.settle() is True, "the count in a row starts again"
    assert guard.settle() is None, "read once"
    for _ in range(2):
        guard.add(loss)
        guard.check(norm)
        guard.settle()
    assert guard.exhausted and guard.counts == {"skipped": 3, "in_a_row": 2}


def test_an_update_without_gradients_changes_nothing(accelerator):
    """What the recipes do with an update that does not pass: neither weights, moments nor decay move."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5))
    weight.grad = torch.full((2,), float("nan"))
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(weight, torch.ones(2)) and not optimizer.state_dict()["state"]


@pytest.mark.parametrize(("norm", "skipped"), [(0.5, 0), (float("inf"), 1), (None, 0)])
def test_a_norm_may_be_a_number_or_missing(norm, skipped, accelerator):
    """DeepSpeed returns a float, and nothing before its first update."""
    guard = UpdateGuard(accelerator, max_nonfinite=2)
    guard.add(GOOD)
    assert guard.check(norm) == skipped
    guard.settle()
    assert guard.skipped == skipped


def test_signals_are_answered_at_the_next_update(accelerator):
    guard = UpdateGuard(accelerator, max_nonfinite=2)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        guard.listen()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert guard.stop is None
        guard.add(GOOD)
        guard.check(None)
        assert guard.settle() and guard.stop == signal.SIGUSR1
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before):
            signal.signal(number, handler)


def test_the_diagnostic_describes_the_batch(accelerator, tmp_path):
    guard = UpdateGuard(accelerator, max_nonfinite=1)
    guard.add(NAN, images=torch.tensor([0.0, 2.0, float("inf")]))
    guard.check(GOOD)
    guard.settle()
    weights = [torch.nn.Parameter(torch.tensor([1.0, float("nan")]))]
    with pytest.raises(UserError, match="not finite in 1 updates in a row, up to step 7"):
        stop_nonfinite(accelerator, tmp_path, 7, guard, weights, learning_rate=0.1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights_not_finite"] == 1 and report["learning_rate"] == 0.1
    images = report["batches"][0][0]["images"]
    assert images == {"shape": [3], "not_finite": 1, "min": 0.0, "max": 2.0, "mean": 1.0, "std": 1.0}
    assert describe_values(NAN) == {"shape": [], "not_finite": 1}


def test_the_log_leaves_out_what_is_not_finite_and_a_line_cut_off(accelerator, tmp_path):
    log = MetricsLogger(accelerator, tmp_path, ("loss", "skipped"), resumed_at=0)
    for loss in (GOOD, NAN, GOOD * 3):
        log.add(loss=loss)
    assert log.write_means(3, skipped=1)["loss"] == 2
    log.add(loss=NAN)
    assert log.write_means(4, skipped=2)["loss"] != 2
    with log.path.open("a") as file:
        file.write("5")  # the start of a line 50, as a full disk leaves it
    MetricsLogger(accelerator, tmp_path, ("loss", "skipped"), resumed_at=9)
    assert [line.split(",")[0] for line in log.path.read_text().splitlines()] == ["step", "3", "4"]
