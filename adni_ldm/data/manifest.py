"""manifest.json: the contents of a data folder, by which a model records what it was trained on.

    write_manifest("data/adni", {"plane": "sagittal", "image_size": 256})   # the hash, "3f0c…"
    manifest_splits(read_manifest("data/adni"))                             # {"002_S_xxxx": "train", …}

For each split and class it lists the subjects, counts scans and images, and holds two hashes: one over
subjects and content, which identifies the data, and one over names and sizes, which is quick to compare when
loading. The file is beside train/ and does not identify the machine that wrote it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath

from adni_ldm.data.folder import FolderListing, SliceFile, classes_in, list_folder
from adni_ldm.data.splits import SPLITS, DataError
from adni_ldm.environment import installed_versions
from adni_ldm.files import read_json, write_json

MANIFEST = "manifest.json"
FORMAT = 1
CONTENT = "subjects and content of files (SHA-256)"  # what the hash of a manifest covers
_LIBRARIES = ("adni-ldm", "numpy", "pandas", "pillow", "scipy", "nilearn", "nibabel", "pydicom", "monai")


def write_manifest(data_dir: str | Path, settings: Mapping) -> str:
    """Write data_dir/manifest.json for the {train,val,test}/CLASS/ below it. Returns its hash, 64 hex digits.

    The hash covers split, class, subject, name and bytes of every image: it does not depend on where the data
    are or what wrote them. `settings` of the preparation and the versions of the libraries are recorded but
    not hashed. Absolute paths among the settings are reduced to their last part, so that neither machine nor
    user is named. The same data and settings give the same bytes.

    Raises:
        DataError: there is no such folder.
    """
    listing = list_folder(data_dir, classes_in(data_dir))
    splits = {
        split: {cls: _describe(files) for cls, files in classes.items()}
        for split, classes in _by_split_and_class(listing).items()
    }
    manifest = {
        "format": FORMAT,
        "hash": _digest(
            f"{split}\0{cls}\0{part['whose']}\0{part['content']}"
            for split, classes in splits.items()
            for cls, part in classes.items()
        ),
        "hash_of": CONTENT,
        "settings": _without_paths(dict(settings)),
        "versions": installed_versions(_LIBRARIES),
        "splits": splits,
    }
    write_json(listing.root / MANIFEST, manifest)
    return manifest["hash"]


def read_manifest(data_dir: str | Path) -> dict | None:
    """Read the manifest of the folder that holds train/; None without one.

    Raises:
        DataError: the file is not a manifest, or has a newer format.
    """
    path = Path(data_dir) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        known = manifest["format"] == FORMAT and {"hash", "splits"} <= set(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a readable manifest ({error}); prepare the data anew") from error
    if not known:
        raise DataError(f"{path}: format {manifest['format']} is newer than this version; update adni-ldm")
    return manifest


def manifest_splits(manifest: Mapping | None) -> dict[str, str]:
    """Return {subject: split} of a manifest, {} of None: the `fixed` of `assign_splits`."""
    return {
        subject: split
        for split, classes in (manifest or {"splits": {}})["splits"].items()
        for part in classes.values()
        for subject in part["subjects"]
    }


def data_hash(listing: FolderListing) -> tuple[str, str]:
    """Return the hash that identifies the data, 64 hex digits, and what it covers.

    The hash of manifest.json if there is one; else of subjects, names and sizes of the files, which are not
    opened: a change that keeps the size goes unnoticed.
    """
    if manifest := read_manifest(listing.root):
        return manifest["hash"], manifest["hash_of"]
    lines = []
    for split, classes in _by_split_and_class(listing).items():
        for cls, files in classes.items():
            lines.append("\0".join((split, cls, _hash_subjects(files), _names_and_sizes(files))))
    return _digest(lines), "subjects, names and sizes of files (SHA-256)"


def manifest_problems(listing: FolderListing, content: bool = False) -> list[str]:
    """Compare the folder with its manifest.json, a line per split and class that differs; [] without one.

    Compares names, sizes and subjects (unless a study table replaces these) and, with `content`, every byte.
    """
    try:
        manifest = read_manifest(listing.root)
    except DataError as error:
        return [str(error)]
    if manifest is None:
        return []
    found, problems = _by_split_and_class(listing), []
    for split in SPLITS:
        for cls in listing.class_names:
            recorded = manifest["splits"].get(split, {}).get(cls)
            files = found.get(split, {}).get(cls)
            if not recorded and not files:
                continue
            same = recorded and files and recorded["names_and_sizes"] == _names_and_sizes(files)
            same = same and (listing.table or recorded["whose"] == _hash_subjects(files))
            same = same and (not content or recorded["content"] == _content(files))
            if not same:
                problems.append(
                    f"{listing.root / MANIFEST}: {split}/{cls} has changed since this was written; "
                    "prepare the data again, or remove the manifest to accept the folder as it is"
                )
    return problems


def _by_split_and_class(listing: FolderListing) -> dict[str, dict[str, list[SliceFile]]]:
    """Files of each split and class that has any, sorted by name."""
    found: dict[str, dict[str, list[SliceFile]]] = {}
    for split in SPLITS:
        for label, cls in enumerate(listing.class_names):
            files = [file for file in listing.files if file.split == split and file.label == label]
            if files:
                found.setdefault(split, {})[cls] = sorted(files, key=_name)
    return found


def _describe(files: Sequence[SliceFile]) -> dict:
    return {
        "subjects": sorted({file.subject for file in files if file.subject is not None}),
        "scans": len({(file.subject, file.scan) for file in files}),
        "images": len(files),
        "whose": _hash_subjects(files),  # the name of format 1
        "content": _content(files),
        "names_and_sizes": _names_and_sizes(files),
    }


def _hash_subjects(files: Sequence[SliceFile]) -> str:
    return _digest(f"{_name(file)}\0{file.subject}" for file in files)


def _content(files: Sequence[SliceFile]) -> str:
    return _digest(
        f"{_name(file)}\0{hashlib.sha256(Path(file.path).read_bytes()).hexdigest()}" for file in files
    )


def _names_and_sizes(files: Sequence[SliceFile]) -> str:
    return _digest(f"{_name(file)}\0{file.size}" for file in files)


def _name(file: SliceFile) -> str:
    return file.path.rpartition("/")[2]


def _digest(lines) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _without_paths(value):
    """Settings as JSON types, with absolute paths reduced to their last part."""
    if isinstance(value, Mapping):
        return {str(key): _without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(part) for part in value]
    if isinstance(value, (str, PurePath)):
        text = str(value)
        absolute = text.startswith(("~", "..")) or PurePath(text).is_absolute() or PureWindowsPath(text).drive
        return PureWindowsPath(text).name if absolute else text
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
