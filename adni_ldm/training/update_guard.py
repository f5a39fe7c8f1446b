"""What all processes must agree on at each update: whether it is applied, and whether the run is to stop."""

import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from adni_ldm.errors import UserError

# What a cluster sends before it takes the machine: Slurm's preemption, and its option --signal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class UpdateGuard:
    """Decides on each update, identically on all processes, by one reduction over them.

    A process that skipped an update or stopped by itself would leave the others waiting for its gradients.
    The decision stays on the device until `settle` reads it: a GPU run reads it one update late, so that the
    host never waits for the update in progress. `skipped` and `in_a_row` are counts from a checkpoint.
    """

    def __init__(self, accelerator: Accelerator, max_nonfinite: int, skipped: int = 0, in_a_row: int = 0):
        self.accelerator, self.max_nonfinite = accelerator, max_nonfinite
        self.skipped, self.in_a_row = skipped, in_a_row
        self.stop: signal.Signals | None = None  # agreed on by all processes
        self.batches: list[dict[str, torch.Tensor]] = []  # of the update in progress
        self.last: list[dict[str, torch.Tensor]] = []  # of the update that was decided on last
        self.grad_norm = torch.tensor(0.0)
        self._received: set[int] = set()  # signals that reached this process
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @property
    def exhausted(self) -> bool:
        """Whether too many consecutive updates were skipped."""
        return self.in_a_row >= self.max_nonfinite

    def listen(self) -> None:
        """Let SIGTERM and SIGUSR1 end the run after its next update, and not at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda received, _frame: self._received.add(received))

    def stop_at_once(self, message: str) -> None:
        """From now on let either signal, or one that has come since the last update, end this process.

        `message` follows the signal's name on the standard output.
        """

        def stop(received: int, _frame: object = None) -> None:
            os.write(1, f"{signal.Signals(received).name}: {message}\n".encode())  # print may be interrupted
            raise SystemExit(128 + received)

        for number in STOP_SIGNALS:
            signal.signal(number, stop)
        for number in self._received:
            stop(number)

    def release_signals(self) -> None:
        """Let either signal end this process as the system does."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def add(self, loss: torch.Tensor, **inputs: torch.Tensor) -> None:
        """Record a batch: its loss, and what a diagnostic report should describe; no wait for the device."""
        self.batches.append({name: tensor.detach() for name, tensor in {"loss": loss, **inputs}.items()})

    def check(self, grad_norm: torch.Tensor | float | None) -> torch.Tensor:
        """Check that losses and gradients of this update are finite on every process.

        Takes what `clip_grad_norm_` returned: a tensor, a float (DeepSpeed), or None. Returns 1.0 if the
        update must be skipped, else 0.0; a tensor () on the device, which `settle` reads.
        """
        device = self.accelerator.device
        if grad_norm is not None:
            grad_norm = torch.as_tensor(grad_norm)
            self.grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        losses = [batch["loss"].float() for batch in self.batches]
        bad = ~torch.stack([*losses, self.grad_norm.float().to(device)]).isfinite().all()
        received = torch.tensor([float(number in self._received) for number in STOP_SIGNALS])
        received = received.to(device, non_blocking=True)
        flags = self.accelerator.reduce(torch.cat([bad.float()[None], received]), "sum")
        self.last, self.batches = self.batches, []
        host, copied = flags, None
        if flags.is_cuda:
            host = torch.empty(flags.shape, pin_memory=True).copy_(flags, non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
        self._pending = host, copied
        return (flags[0] > 0).float()

    def settle(self) -> bool | None:
        """Read the decision on the last update: True if it was applied, None if it was read before."""
        if self._pending is None:
            return None
        (flags, copied), self._pending = self._pending, None
        if copied is not None:
            copied.synchronize()
        bad, *stops = flags.tolist()
        self.stop = next((number for number, count in zip(STOP_SIGNALS, stops) if count), self.stop)
        self.skipped += bool(bad)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        return not bad


def ignore_stop_signals(_worker: int = 0) -> None:
    """For the workers of a DataLoader: a signal to the whole group must not end them before the recipe."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_nonfinite(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    guard: UpdateGuard,
    parameters: Iterable[torch.nn.Parameter],
    **values: float,
) -> None:
    """Write `report.json` into the folder of the last state, and raise UserError. Every process calls it.

    `values` are further numbers for the report, such as the learning rate.
    """
    batches = [{name: describe_values(tensor) for name, tensor in batch.items()} for batch in guard.last]
    report = {
        "step": step,
        "skipped_in_a_row": guard.in_a_row,
        "gradient_norm": str(guard.grad_norm.item()),
        "gradient_scale": accelerator.scaler.get_scale() if accelerator.scaler else None,
        "weights_not_finite": sum(int((~parameter.isfinite()).sum()) for parameter in parameters),
        **values,
        "batches": gather_object([batches]),  # by process
    }
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    accelerator.wait_for_everyone()
    raise UserError(
        f"loss or gradient not finite in {guard.in_a_row} updates in a row, up to step {step}: "
        f"{folder / 'report.json'} describes the batch; try a lower --learning_rate, "
        "or --mixed_precision bf16 in place of fp16"
    )


def describe_values(tensor: torch.Tensor) -> dict[str, object]:
    """Shape, range, mean and standard deviation of the finite values, and the number of the others."""
    values = tensor.detach().float().flatten()
    finite = values[values.isfinite()]
    statistics = {"shape": list(tensor.shape), "not_finite": values.numel() - finite.numel()}
    if finite.numel():
        statistics |= {"min": finite.min().item(), "max": finite.max().item(), "mean": finite.mean().item()}
        statistics["std"] = finite.std(correction=0).item()
    return statistics
