"""A look at a data folder before hours of training: what is in it, and everything that is wrong with it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from datasets.utils import tqdm

from adni_ldm.data.slices import CLASS_NAMES, open_data_dir, read_image
from adni_ldm.data.splits import SPLITS, DataError, SliceFile, scan_folder


@dataclass
class CheckReport:
    """What `check_folder` found. `str(report)` is the text to print."""

    folder: Path
    images: int = 0
    table: list[tuple[str, ...]] = field(default_factory=list)  # cells as printed, see _count
    sizes: Counter[str] = field(default_factory=Counter)  # "256 x 240" (width x height): images
    modes: Counter[str] = field(default_factory=Counter)  # PIL's name of the pixel type, "L": images
    problems: list[str] = field(default_factory=list)  # each names a path and says what to do
    notes: list[str] = field(default_factory=list)  # worth knowing, no hindrance

    @property
    def ok(self) -> bool:
        """Whether the folder can be trained on."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.images} images"]
        if self.images:
            header = ("split", "class", "images", "subjects", "slices a subject")
            lines += ["", *_align([header, *self.table]), ""]
            lines += [f"sizes  {_tally(self.sizes)}", f"modes  {_tally(self.modes)}"]
        for title, items in (("notes", self.notes), ("problems", self.problems)):
            if items:
                lines += ["", f"{len(items)} {title if len(items) > 1 else title[:-1]}:"]
                lines += [f"  {item}" for item in items]
        return "\n".join([*lines, "", "ok" if self.ok else "not fit for training: see the problems above"])


def check_folder(
    data_dir: str | Path, *, class_names: Sequence[str] = CLASS_NAMES, num_threads: int | None = None
) -> CheckReport:
    """All that `load_slices` and `to_arrays` would stumble over in `data_dir`, and a count of what is there.

    Decodes every image, on `num_threads` threads (by default as many as there are cores), with a progress bar
    that `datasets.disable_progress_bars()` turns off. Raises nothing for bad data and writes nothing to the
    folder: what is wrong is in the report's `problems`.
    """
    try:
        scan = scan_folder(open_data_dir(data_dir), class_names)
    except DataError as error:
        return CheckReport(Path(data_dir), problems=[str(error)])
    report = CheckReport(scan.root, len(scan.files), problems=list(scan.problems), notes=list(scan.notes))
    report.table = _count(scan.files, class_names)

    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:  # PIL lets go of the GIL while it decodes
        results = pool.map(_decode, scan.files)
        for size, mode, problem in tqdm(results, total=len(scan.files), desc="Decoding images", unit="image"):
            if problem:
                report.problems.append(problem)
            else:
                report.sizes[size] += 1
                report.modes[mode] += 1
    return report


def _decode(file: SliceFile) -> tuple[str, str, str | None]:
    """Size, mode and no problem; or the problem."""
    try:
        image = read_image(file.path)
    except DataError as error:
        return "", "", str(error)
    return f"{image.width} x {image.height}", image.mode, None


def _count(files: Iterable[SliceFile], class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """One row a split and class: split, class, images, subjects, slices a subject."""
    slices: dict[tuple[str, int], Counter[str | None]] = defaultdict(Counter)
    for file in files:
        slices[file.split, file.label][file.subject] += 1
    rows = []
    for split in SPLITS:
        for label, cls in enumerate(class_names):
            if not (counts := slices.get((split, label))):
                continue
            images = counts.total()
            counts.pop(None, None)  # files that do not tell their subject
            low, high = min(counts.values(), default=0), max(counts.values(), default=0)
            each = str(low) if low == high else f"{low} to {high}"
            rows.append((split, cls, str(images), str(len(counts)), each))
    return rows


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of text: the two columns of names to the left, the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _tally(counts: Counter[str], most: int = 5) -> str:
    """The most frequent first: "256 x 240: 30519, 256 x 256: 1"."""
    parts = [f"{name}: {count}" for name, count in counts.most_common(most)]
    return ", ".join(parts + ([f"and {len(counts) - most} others"] if len(counts) > most else []))
