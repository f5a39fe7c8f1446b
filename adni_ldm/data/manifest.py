"""manifest.json: what a data folder holds, so that a model can say what it was trained on.

    write_manifest("data/adni", {"plane": "sagittal", "image_size": 256})   # the hash, "3f0c…"
    manifest_splits(read_manifest("data/adni"))                             # {"002_S_0413": "train", …}

For each split and class it lists the subjects, counts scans and images, and holds two hashes: one over
subjects and content, which is the data's identity, and one over names and sizes, which loading compares in a
moment. The file stands beside train/ and says nothing of the machine that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PureWindowsPath

from adni_ldm.data.folder import FolderListing, SliceFile, classes_in, list_folder
from adni_ldm.data.splits import SPLITS, DataError
from adni_ldm.environment import installed_versions

MANIFEST = "manifest.json"
FORMAT = 1
CONTENT = "subjects and content of files (SHA-256)"  # what the hash of a manifest is taken over
_LIBRARIES = ("adni-ldm", "numpy", "pandas", "pillow", "scipy", "nilearn", "nibabel", "pydicom", "monai")


def write_manifest(data_dir: str | Path, settings: Mapping) -> str:
    """Write data_dir/manifest.json for the {train,val,test}/CLASS/ below it; returns its hash, 64 hex digits.

    The hash is over split, class, subject, name and bytes of every image: the same data has the same hash
    wherever it lies and whatever made it. `settings` (what the data was made with) and the versions of the
    libraries are recorded and not hashed. Absolute paths among the settings lose all but their last part, so
    that no machine and no user is named. The file appears whole or not at all, and the same data and settings
    give the same bytes.

    Raises DataError where there is no such folder.
    """
    scan = list_folder(data_dir, classes_in(data_dir))
    splits = {
        split: {cls: _describe(files) for cls, files in classes.items()}
        for split, classes in _by_split_and_class(scan).items()
    }
    manifest = {
        "format": FORMAT,
        "hash": _digest(
            f"{split}\0{cls}\0{part['whose']}\0{part['content']}"
            for split, classes in splits.items()
            for cls, part in classes.items()
        ),
        "hash_of": CONTENT,
        "settings": _without_places(dict(settings)),
        "versions": installed_versions(_LIBRARIES),
        "splits": splits,
    }
    partial = scan.root / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, scan.root / MANIFEST)
    return manifest["hash"]


def read_manifest(data_dir: str | Path) -> dict | None:
    """The manifest of the folder that holds train/; None where there is none.

    Raises DataError for a file that is no manifest, or one of a format that this version does not know.
    """
    path = Path(data_dir) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and {"hash", "splits"} <= set(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no manifest that can be read ({error}); prepare the data anew") from error
    if not known:
        raise DataError(f"{path}: format {manifest['format']} is not known here; update adni-ldm")
    return manifest


def manifest_splits(manifest: Mapping | None) -> dict[str, str]:
    """{subject: split} of a manifest, {} of None: what `assign_splits` takes as `fixed`."""
    return {
        subject: split
        for split, classes in (manifest or {"splits": {}})["splits"].items()
        for part in classes.values()
        for subject in part["subjects"]
    }


def data_hash(scan: FolderListing) -> tuple[str, str]:
    """Identity of the data, 64 hex digits, and what it is taken over.

    That of manifest.json where there is one; else taken in memory over the subjects and the names and sizes
    of the files, which opens none of them: a picture changed without a change in size goes unnoticed.
    """
    if manifest := read_manifest(scan.root):
        return manifest["hash"], manifest["hash_of"]
    lines = []
    for split, classes in _by_split_and_class(scan).items():
        for cls, files in classes.items():
            lines.append("\0".join((split, cls, _whose(files), _names_and_sizes(files))))
    return _digest(lines), "subjects, names and sizes of files (SHA-256)"


def manifest_problems(scan: FolderListing, content: bool = False) -> list[str]:
    """Where the folder is not what its manifest.json says, one line a split and class; [] without a manifest.

    Compares names, sizes and subjects (where no study table names them) and, with `content`, every byte.
    """
    try:
        manifest = read_manifest(scan.root)
    except DataError as error:
        return [str(error)]
    if manifest is None:
        return []
    found, problems = _by_split_and_class(scan), []
    for split in SPLITS:
        for cls in scan.class_names:
            told = manifest["splits"].get(split, {}).get(cls)
            files = found.get(split, {}).get(cls)
            if not told and not files:
                continue
            same = told and files and told["names_and_sizes"] == _names_and_sizes(files)
            same = same and (scan.table or told["whose"] == _whose(files))
            same = same and (not content or told["content"] == _content(files))
            if not same:
                problems.append(
                    f"{scan.root / MANIFEST}: {split}/{cls} is not what it was when this was written; "
                    "prepare the data anew, or remove the manifest to vouch for what is there"
                )
    return problems


def _by_split_and_class(scan: FolderListing) -> dict[str, dict[str, list[SliceFile]]]:
    """Files of each split and class that has any, sorted by name."""
    found: dict[str, dict[str, list[SliceFile]]] = {}
    for split in SPLITS:
        for label, cls in enumerate(scan.class_names):
            files = [file for file in scan.files if file.split == split and file.label == label]
            if files:
                found.setdefault(split, {})[cls] = sorted(files, key=_name)
    return found


def _describe(files: Sequence[SliceFile]) -> dict:
    return {
        "subjects": sorted({file.subject for file in files if file.subject is not None}),
        "scans": len({(file.subject, file.scan) for file in files}),
        "images": len(files),
        "whose": _whose(files),
        "content": _content(files),
        "names_and_sizes": _names_and_sizes(files),
    }


def _whose(files: Sequence[SliceFile]) -> str:
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


def _without_places(value):
    """Settings as JSON takes them, with absolute paths cut down to their last part."""
    if isinstance(value, Mapping):
        return {str(key): _without_places(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(part) for part in value]
    if isinstance(value, (str, PurePath)):
        text = str(value)
        absolute = text.startswith(("~", "..")) or PurePath(text).is_absolute() or PureWindowsPath(text).drive
        return PureWindowsPath(text).name if absolute else text
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)
