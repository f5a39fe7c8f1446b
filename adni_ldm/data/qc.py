"""Quality control (QC) of a data folder before training: its contents and all its problems."""

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

MOST_PAIRS = 20  # duplicates that are listed individually


@dataclass
class QCReport:
    """The result of `check_folder`. `str(report)` is the text to print."""

    folder: Path
    images: int = 0
    table: list[tuple[str, ...]] = field(default_factory=list)  # cells as printed, see _count
    sizes: Counter[str] = field(default_factory=Counter)  # "256 x 240" (width x height): images
    modes: Counter[str] = field(default_factory=Counter)  # PIL's name of the pixel type, "L": images
    problems: list[str] = field(default_factory=list)  # each names a path and what to do
    notes: list[str] = field(default_factory=list)  # these do not prevent training
    class_names: Sequence[str] = ()
    files: list[SliceFile] = field(default_factory=list)  # those that can be decoded
    intensities: dict[str, np.ndarray] = field(default_factory=dict)  # class: pixels of each grey, (256,)
    near: list[Pair] = field(default_factory=list)  # near-duplicates under two subjects or splits

    @property
    def ok(self) -> bool:
        """Whether the folder can be trained on."""
        return not self.problems

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.images} images"]
        if self.images:
            header = ("split", "class", "images", "subjects", "slices per subject")
            lines += ["", *_align([header, *self.table]), ""]
            lines += [f"sizes  {_tally(self.sizes)}", f"modes  {_tally(self.modes)}"]
        for title, items in (("notes", self.notes), ("problems", self.problems)):
            if items:
                lines += ["", f"{len(items)} {title if len(items) > 1 else title[:-1]}:"]
                lines += [f"  {item}" for item in items]
        return "\n".join([*lines, "", "ok" if self.ok else "cannot be trained on: see the problems above"])


def check_folder(
    data_dir: str | Path,
    *,
    class_names: Sequence[str] = CLASS_NAMES,
    table: str | Path | None = None,
    num_threads: int | None = None,
) -> QCReport:
    """Find every problem that `load_slices` and `to_arrays` would raise for `data_dir`, and count its images.

    Decodes every image, on `num_threads` threads (None: one per core), with a progress bar that
    `datasets.disable_progress_bars()` turns off; searches for duplicates across subjects and splits (exact
    ones are problems, near-duplicates are notes, since a hash can err); and compares the bytes with
    manifest.json if there is one. `table` is the study table that image IDs are looked up in. Bad data raise
    nothing, and nothing is written: see the report's `problems`.
    """
    try:
        listing = open_folder(data_dir, class_names, table)
    except UserError as error:
        return QCReport(Path(data_dir), problems=[str(error)])
    report = QCReport(
        listing.root, len(listing.files), problems=list(listing.problems), notes=list(listing.notes)
    )
    report.class_names = class_names
    report.table = _count(listing.files, class_names)
    _check_manifest(report, listing)

    contents, hashes = [], [np.empty((0, 9), np.uint64)]
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:  # PIL releases the GIL while it decodes
        results = pool.map(_decode, listing.files)
        results = tqdm(results, total=len(listing.files), desc="Decoding images", unit="image")
        for file, image in zip(listing.files, results, strict=True):
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
    """What is kept of a decoded image."""

    size: str  # "256 x 240" (width x height)
    mode: str
    content: bytes
    hash: np.ndarray  # uint64 (9,)
    histogram: np.ndarray  # (256,)


def _decode(file: SliceFile) -> _Image | str:
    """Decode an image. Returns the problem if it cannot be decoded."""
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


def _check_manifest(report: QCReport, listing: FolderListing) -> None:
    """Report whether the folder matches its manifest.json, by every byte."""
    known = set(report.problems)
    report.problems += [
        problem for problem in manifest_problems(listing, content=True) if problem not in known
    ]
    if known == set(report.problems) and (manifest := read_manifest(listing.root)):
        report.notes.append(f"{listing.root}: matches its manifest.json, hash {manifest['hash'][:16]}")


def _report_duplicates(report: QCReport, contents: Sequence[bytes], hashes: np.ndarray) -> None:
    exact, report.near = find_duplicates(report.files, contents, hashes)
    for pairs, lines, advice in (
        (exact, report.problems, "the same image twice; remove one, or give both the same subject"),
        (report.near, report.notes, "near-duplicates; check whether a subject has two names"),
    ):
        for pair in pairs[:MOST_PAIRS]:
            first, second = (Path(file.path).relative_to(report.folder) for file in (pair.first, pair.second))
            more = f" (and {pair.more} more of these two subjects)" if pair.more else ""
            lines.append(f"{report.folder}: {first} and {second}{more}: {advice}")
        if len(pairs) > MOST_PAIRS:
            lines.append(f"{report.folder}: {len(pairs) - MOST_PAIRS} more such pairs of subjects; {advice}")


def _count(files: Iterable[SliceFile], class_names: Sequence[str]) -> list[tuple[str, ...]]:
    """One row per split and class: split, class, images, subjects, slices per subject."""
    slices: dict[tuple[str, int], Counter[str | None]] = defaultdict(Counter)
    for file in files:
        slices[file.split, file.label][file.subject] += 1
    rows = []
    for split in SPLITS:
        for label, cls in enumerate(class_names):
            if not (counts := slices.get((split, label))):
                continue
            images = counts.total()
            counts.pop(None, None)  # files without a subject
            low, high = min(counts.values(), default=0), max(counts.values(), default=0)
            each = str(low) if low == high else f"{low} to {high}"
            rows.append((split, cls, str(images), str(len(counts)), each))
    return rows


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of text: two left-aligned columns of names, then right-aligned numbers."""
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
