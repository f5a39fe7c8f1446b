"""metrics.csv of a run, its loss curves, and accelerate's tracker."""

import csv
from pathlib import Path

import torch
from accelerate import Accelerator

from adni_ldm.figures import save_curves
from adni_ldm.files import atomic_file, flush


class MetricsLogger:
    """Appends rows to `metrics.csv` and passes them to accelerate's tracker; only the main process writes.

    What was not measured at a step stays empty. Rows after `resumed_at` are dropped: they are written again.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: str | Path, columns: tuple[str, ...], resumed_at: int
    ):
        self.accelerator = accelerator
        self.path = Path(output_dir) / "metrics.csv"
        self.columns = ("step", *columns)
        self.pending: list[dict[str, torch.Tensor]] = []  # of batches since the last row
        if not accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = self._earlier_rows(resumed_at)
        with atomic_file(self.path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")  # columns of another version
            writer.writeheader()
            writer.writerows(earlier)

    def _earlier_rows(self, resumed_at: int) -> list[dict[str, str]]:
        """Rows up to the step resumed at, without a last one that a kill or a full disk truncated."""
        if not resumed_at or not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        rows = csv.DictReader(line for line in lines if line.endswith("\n"))
        return [row for row in rows if int(row["step"]) <= resumed_at]

    def add(self, **values: torch.Tensor) -> None:
        """Keep scalars of one batch for the next `write_means`, without waiting for the device."""
        self.pending.append({name: value.detach() for name, value in values.items()})

    def write_means(self, step: int, **values: float) -> dict[str, float]:
        """Write a row with the means over batches and processes of what was added since the last row.

        Values that are not finite are left out; if no others remain, the mean is NaN.
        """
        names = list(self.pending[0])
        stacked = torch.stack([torch.stack([batch[name] for name in names]) for batch in self.pending])
        finite = stacked.isfinite()
        sums = torch.stack([stacked.nan_to_num(0, 0, 0).sum(dim=0), finite.sum(dim=0).to(stacked)])
        total, count = self.accelerator.reduce(sums, "sum")
        means = (total / count).tolist()
        self.pending.clear()
        row = dict(zip(names, means, strict=True)) | values
        self.write(step, **row)
        return row

    def write(self, step: int, **values: float) -> None:
        """Write a row."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow({"step": step, **values})

    def flush(self) -> None:
        """Wait until all rows are on the disk: a checkpoint must not outlast them."""
        if self.accelerator.is_main_process:
            flush(self.path)

    def plot(self) -> None:
        """Write `loss.png` beside the CSV file."""
        if self.accelerator.is_main_process:
            save_curves(self.path, self.path.with_name("loss.png"))
