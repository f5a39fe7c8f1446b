"""What all processes must agree on at each update: whether it is taken, and whether the run is to stop."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from adni_ldm.errors import UserError

logger = logging.getLogger(__name__)

# What a cluster sends before it takes the machine: Slurm's pre-emption, and its --signal=USR1@120.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class UpdateCheck:
    """Looks at the loss of each batch and decides, alike on all processes, about each update.

    One sum over the processes an update: a process that skipped or stopped by itself would leave the others
    waiting for its gradients.

    Args:
        max_nonfinite: updates in a row whose loss or gradient is not finite before the run ends.
        skipped, in_a_row: what a checkpoint gave back.
    """

    def __init__(self, accelerator: Accelerator, max_nonfinite: int, skipped: int = 0, in_a_row: int = 0):
        self.accelerator, self.max_nonfinite = accelerator, max_nonfinite
        self.skipped, self.in_a_row = skipped, in_a_row
        self.stop: signal.Signals | None = None  # agreed on
        self.batches: list[dict[str, torch.Tensor]] = []  # of this update
        self.last: list[dict[str, torch.Tensor]] = []  # of the update decided on
        self.grad_norm = torch.tensor(0.0)
        self._received: set[int] = set()  # by this process

    @property
    def counts(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @property
    def taken(self) -> bool:
        """Whether the last update was taken."""
        return self.in_a_row == 0

    def listen(self) -> None:
        """From now on SIGTERM and SIGUSR1 end the run at its next update, and not at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, lambda received, _frame: self._received.add(received))

    def add(self, loss: torch.Tensor, **inputs: torch.Tensor) -> None:
        """Note a batch: its loss, and what a diagnostic should tell about. Waits for no device."""
        self.batches.append({name: tensor.detach() for name, tensor in {"loss": loss, **inputs}.items()})

    def passes(self, grad_norm: torch.Tensor | None) -> bool:
        """Whether the losses and the gradients of this update are finite on every process.

        Args:
            grad_norm: what `clip_grad_norm_` returned; None where the launcher has none.
        """
        if grad_norm is not None:
            self.grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm
        device = self.accelerator.device
        losses = [batch["loss"].float() for batch in self.batches]
        bad = ~torch.stack([*losses, self.grad_norm.float().to(device)]).isfinite().all()
        received = torch.tensor([float(number in self._received) for number in STOP_SIGNALS], device=device)
        flags = torch.cat([bad.float()[None], received])
        bad, *stops = self.accelerator.reduce(flags, "sum").tolist()
        self.stop = next((number for number, count in zip(STOP_SIGNALS, stops) if count), None)
        if bad:
            self.skipped += 1
            self.in_a_row += 1
        else:
            self.in_a_row = 0
        self.last, self.batches = self.batches, []
        return not bad

    @property
    def exhausted(self) -> bool:
        """Whether too many updates in a row were skipped."""
        return self.in_a_row >= self.max_nonfinite


def exit_code(number: signal.Signals) -> int:
    """What a shell says of a program that a signal ended: 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + number


def ignore_stop_signals(_worker: int = 0) -> None:
    """For the workers of a DataLoader: a signal to the whole group must not end them before the recipe."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop_nonfinite(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    check: UpdateCheck,
    parameters: Iterable[torch.nn.Parameter],
    **values: float,
) -> None:
    """Write `report.json` into the folder of the last state, and end the run. Every process calls it.

    Args:
        values: further numbers for the report, as the learning rate.

    Raises:
        UserError: always.
    """
    batches = [{name: describe_values(tensor) for name, tensor in batch.items()} for batch in check.last]
    report = {
        "step": step,
        "skipped_in_a_row": check.in_a_row,
        "gradient_norm": str(check.grad_norm.item()),
        "gradient_scale": accelerator.scaler.get_scale() if accelerator.scaler else None,
        "weights_not_finite": sum(int((~parameter.isfinite()).sum()) for parameter in parameters),
        **values,
        "batches": gather_object([batches]),  # by process
    }
    if accelerator.is_main_process:
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    accelerator.wait_for_everyone()
    raise UserError(
        f"loss or gradient not finite in {check.in_a_row} updates in a row, up to step {step}: "
        f"{folder / 'report.json'} describes the batch; try a lower --learning_rate, "
        "or --mixed_precision bf16 in place of fp16"
    )


def describe_values(tensor: torch.Tensor) -> dict[str, object]:
    """Shape, range, mean and standard deviation of the finite values, and how many are not."""
    values = tensor.detach().float().flatten()
    finite = values[values.isfinite()]
    statistics = {"shape": list(tensor.shape), "not_finite": values.numel() - finite.numel()}
    if finite.numel():
        statistics |= {"min": finite.min().item(), "max": finite.max().item(), "mean": finite.mean().item()}
        statistics["std"] = finite.std(correction=0).item()
    return statistics
