"""The run's log: metrics.csv, its picture, and the tracker."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch
from accelerate import Accelerator

from adni_ldm.figures import save_curves


class RunLog:
    """Appends lines to `metrics.csv` and hands them to accelerate's tracker; the main process alone writes.

    Args:
        columns: what a line may hold beside the step; what was not measured at a step stays empty.
        resumed_at: lines after this step are dropped, since they will be written again.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: str | Path, columns: tuple[str, ...], resumed_at: int
    ):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "metrics.csv"
        self.columns = ("step", *columns)
        self.pending: list[dict[str, torch.Tensor]] = []  # of batches since the last line
        if not accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name("metrics.csv.partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self._earlier_lines(resumed_at))
        os.replace(partial, self.path)

    def _earlier_lines(self, resumed_at: int) -> list[dict[str, str]]:
        """Lines up to the step resumed at, but for a last one that a kill or a full disk cut off."""
        if not resumed_at or not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        rows = csv.DictReader(line for line in lines if line.endswith("\n"))
        columns = self.columns
        return [
            {name: row.get(name, "") for name in columns} for row in rows if int(row["step"]) <= resumed_at
        ]

    def add(self, **values: torch.Tensor) -> None:
        """Keep scalars of one batch for the next `write_means`; waits for no device."""
        self.pending.append({name: value.detach() for name, value in values.items()})

    def write_means(self, step: int, **values: float) -> dict[str, float]:
        """Add a line with the means of what was added since the last, over batches and processes.

        Values that are not finite are left out; where there is no other, the mean is NaN.
        """
        names = list(self.pending[0])
        stacked = torch.stack([torch.stack([batch[name] for name in names]) for batch in self.pending])
        finite = stacked.isfinite()
        sums = torch.stack([stacked.nan_to_num(0, 0, 0).sum(dim=0), finite.sum(dim=0).to(stacked)])
        total, count = self.accelerator.reduce(sums, "sum")
        means = (total / count).tolist()
        self.pending.clear()
        line = dict(zip(names, means, strict=True)) | values
        self.write(step, **line)
        return line

    def write(self, step: int, **values: float) -> None:
        """Add a line."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow({"step": step, **values})

    def draw(self) -> None:
        """Write `loss.png` beside the CSV."""
        if self.accelerator.is_main_process:
            save_curves(self.path, self.path.with_name("loss.png"))
