"""Where the images of a subject lie who has withdrawn: data folder, caches, and models trained on them.

Caches can be deleted, since they are made again from the data; the data themselves and models are listed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from datasets import Dataset, config

from adni_ldm.data.archives import cache_dir, open_data_dir
from adni_ldm.data.folder import FolderListing, SliceFile, classes_in, list_folder
from adni_ldm.data.names import parse_name
from adni_ldm.data.provenance import was_trained_on
from adni_ldm.errors import UserError
from adni_ldm.files import read_json

_TABLES = (".csv", ".tsv", ".json")


@dataclass(frozen=True)
class Trace:
    """A place that has, or may have, images or the name of a subject."""

    kind: str  # data, cache or model
    path: Path
    what: str


def find_traces(
    subject: str,
    data_dir: str | Path,
    runs: Sequence[str | Path] = (),
    table: str | Path | None = None,
    latents: Sequence[str | Path] = (),
    folder: Path | None = None,
) -> list[Trace]:
    """Find a subject, by its ID or the image ID of a scan, in a data folder or zip, in caches, and in models.

    Args:
        runs: folders that hold models, at any depth.
        table: the study table by which image IDs are assigned to subjects.
        latents: folders of cached latents.
        folder: where `as_folder` has written `data_dir`, if it is a data set.
    """
    root = open_data_dir(folder or data_dir)
    files = _files_of(list_folder(root, classes_in(root), table), subject)
    names = {subject} | {name for file in files for name in (file.subject, file.scan) if name}
    traces = []
    if root != Path(data_dir).expanduser():
        traces += (
            [Trace("data", Path(data_dir), f"zip or data set with {len(files)} slices")] if files else []
        )
    else:
        traces += _in_data(root, files, names)
    traces += _in_unpacked(subject, table)
    traces += _in_prepared(names, {file.path for file in files})
    for place in sorted(cache_dir("datasets").glob("*")):
        traces.append(Trace("cache", place, "rows of data sets; of which subjects is not recorded"))
    for folder in latents:
        for record in sorted(Path(folder).expanduser().glob("*/latents.json")):
            traces.append(Trace("cache", record.parent, "latents; of which subjects is not recorded"))
    return traces + [trace for folder in runs for trace in _in_models(Path(folder), names)]


def _files_of(listing: FolderListing, subject: str) -> list[SliceFile]:
    of_scan = {file.subject for file in listing.files if subject in (file.subject, file.scan)}
    return [file for file in listing.files if file.subject in of_scan]


def _in_data(root: Path, files: Sequence[SliceFile], names: set[str]) -> Iterator[Trace]:
    """Images of the subject, and tables that name it, in a data folder; also those that no split lists."""
    images = {Path(file.path) for file in files}
    for path in sorted(Path(os.path.abspath(root)).rglob("*")):
        if path.suffix in _TABLES and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if any(re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text) for name in names):
                yield Trace("data", path, "names the subject")
        elif path.is_file() and (path in images or _is_named(path.stem, names)):
            yield Trace("data", path, "image")


def _in_unpacked(subject: str, table: str | Path | None) -> Iterator[Trace]:
    """Unpacked zips; those of earlier versions lie among the downloads of the datasets library."""
    places = (cache_dir("unpacked"), Path(config.HF_DATASETS_CACHE, "downloads", "extracted"))
    for folder in sorted(path for place in places for path in place.glob("*") if path.is_dir()):
        try:
            files = _files_of(list_folder(folder, classes_in(folder), table), subject)
        except UserError:  # not a folder of slices
            continue
        if files:
            yield Trace("cache", folder, f"unpacked, {len(files)} slices")


def _in_prepared(names: set[str], paths: set[str]) -> Iterator[Trace]:
    """Arrow files of prepared slices and of their hashes, and lists of images by path."""
    for place in (cache_dir("slices"), Path(config.HF_DATASETS_CACHE)):
        for folder in sorted((place / "imagefolder").glob("*")):
            if any(_lists(file, names, paths) for file in sorted(folder.rglob("*.arrow"))):
                yield Trace("cache", folder, "prepared slices")


def _lists(file: Path, names: set[str], paths: set[str]) -> bool:
    try:
        rows = Dataset.from_file(str(file))
    except (OSError, pyarrow.ArrowInvalid):  # half-written
        return True
    for column in {"subject", "scan"} & set(rows.column_names):
        if names & set(rows[column][:]):
            return True
    if "subject" in rows.column_names or "image" not in rows.column_names:
        return False
    listed = [image["path"] for image in rows.data.table["image"].to_pylist() if image["path"]]
    return any(path in paths or _is_named(Path(path).stem, names) for path in listed)


def _in_models(folder: Path, names: set[str]) -> Iterator[Trace]:
    if not folder.is_dir():
        raise UserError(f"--runs {folder}: no such folder")
    for path in sorted(folder.rglob("config.json")):
        records = read_json(path).get("_trained_on") or ()
        if was_trained_on(records, names):
            yield Trace("model", path.parent, "trained on the subject; retrain it without")
        elif any(not record["ids"] for record in records):
            yield Trace("model", path.parent, "published without its subjects: look up its data hash")


def _is_named(stem: str, names: set[str]) -> bool:
    name = parse_name(stem)
    return bool({name.subject, name.scan} & names)
