"""A look at a data folder before hours of training: what is in it, and everything that is wrong with it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets.utils import tqdm

from adni_ldm.data.duplicates import Pair, content_hash, difference_hash, find_duplicates
from adni_ldm.data.folder import FolderListing, SliceFile
from adni_ldm.data.manifest import manifest_problems, read_manifest
from adni_ldm.data.slices import CLASS_NAMES, open_folder, read_image, to_grey
from adni_ldm.data.splits import SPLITS
from adni_ldm.errors import UserError

MOST_PAIRS = 20  # duplicates that are listed one by one


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
    class_names: Sequence[str] = ()
    files: list[SliceFile] = field(default_factory=list)  # those that can be decoded
    intensities: dict[str, np.ndarray] = field(default_factory=dict)  # class: pixels of each grey, (256,)
    near: list[Pair] = field(default_factory=list)  # nearly the same picture under two subjects or splits

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
    data_dir: str | Path,
    *,
    class_names: Sequence[str] = CLASS_NAMES,
    table: str | Path | None = None,
    num_threads: int | None = None,
) -> CheckReport:
    """All that `load_slices` and `to_arrays` would stumble over in `data_dir`, and a count of what is there.

    With `table`, the archive's study table, subjects are the persons that the files' image IDs belong to.
    Decodes every image, on `num_threads` threads (by default as many as there are cores), with a progress bar
    that `datasets.disable_progress_bars()` turns off, and looks for the same picture under two subjects or in
    two splits: exactly the same is a problem, nearly the same a note, since a hash can err. Compares the
    bytes with manifest.json where there is one. Raises nothing for bad data and writes nothing to the folder:
    what is wrong is in the report's `problems`.
    """
    try:
        scan = open_folder(data_dir, class_names, table)
    except UserError as error:
        return CheckReport(Path(data_dir), problems=[str(error)])
    report = CheckReport(scan.root, len(scan.files), problems=list(scan.problems), notes=list(scan.notes))
    report.class_names = class_names
    report.table = _count(scan.files, class_names)
    _check_manifest(report, scan)

    contents, hashes = [], [np.empty((0, 9), np.uint64)]
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:  # PIL lets go of the GIL while it decodes
        results = pool.map(_decode, scan.files)
        results = tqdm(results, total=len(scan.files), desc="Decoding images", unit="image")
        for file, image in zip(scan.files, results, strict=True):
            if isinstance(image, str):
                report.problems.append(image)
                continue
            report.files.append(file)
            report.sizes[image.size] += 1
            report.modes[image.mode] += 1
            pixels = report.intensities.setdefault(class_names[file.label], np.zeros(256, np.int64))
            pixels += image.histogram
            contents.append(image.content)
            hashes.append(image.hash[None])
    _report_duplicates(report, contents, np.concatenate(hashes))
    return report


@dataclass(frozen=True)
class _Image:
    """What is kept of an image that was decoded."""

    size: str  # "256 x 240" (width x height)
    mode: str
    content: bytes
    hash: np.ndarray  # uint64 (9,)
    histogram: np.ndarray  # (256,)


def _decode(file: SliceFile) -> _Image | str:
    """What there is to know of an image; or the problem."""
    try:
        image = read_image(file.path)
    except UserError as error:
        return str(error)
    grey = to_grey(image)
    return _Image(
        size=f"{image.width} x {image.height}",
        mode=image.mode,
        content=content_hash(grey),
        hash=difference_hash(grey),
        histogram=np.array(grey.histogram()),
    )


def _check_manifest(report: CheckReport, scan: FolderListing) -> None:
    """Says what manifest.json says, and where its hash of every byte is another one."""
    known = set(report.problems)
    report.problems += [problem for problem in manifest_problems(scan, content=True) if problem not in known]
    if known == set(report.problems) and (manifest := read_manifest(scan.root)):
        report.notes.append(f"{scan.root}: is what its manifest.json says, hash {manifest['hash'][:16]}")


def _report_duplicates(report: CheckReport, contents: Sequence[bytes], hashes: np.ndarray) -> None:
    exact, report.near = find_duplicates(report.files, contents, hashes)
    for pairs, lines, said in (
        (exact, report.problems, "the same picture twice; remove one, or name both after their one subject"),
        (report.near, report.notes, "nearly the same picture; look whether one person has two names"),
    ):
        for pair in pairs[:MOST_PAIRS]:
            one, other = (Path(file.path).relative_to(report.folder) for file in (pair.first, pair.second))
            more = f" (and {pair.more} more of these two)" if pair.more else ""
            lines.append(f"{report.folder}: {one} and {other}{more}: {said}")
        if len(pairs) > MOST_PAIRS:
            lines.append(f"{report.folder}: {len(pairs) - MOST_PAIRS} more such pairs of subjects; {said}")


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
