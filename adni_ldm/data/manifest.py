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
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PurePath, PureWindowsPath

from adni_ldm.data.splits import SPLITS, DataError, Scan, SliceFile, classes_in, scan_folder

MANIFEST = "manifest.json"
FORMAT = 1
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
    scan = scan_folder(data_dir, classes_in(data_dir))
    splits = {
        split: {cls: _describe(files) for cls, files in classes.items()}
        for split, classes in _by_split_and_class(scan).items()
    }
    manifest = {
        "format": FORMAT,
        "hash": _digest(
            f"{s}/{c} {part['content']}" for s, parts in splits.items() for c, part in parts.items()
        ),
        "hash_of": "subjects and content of files (SHA-256)",
        "settings": _without_places(dict(settings)),
        "versions": {"python": platform.python_version()} | _versions(),
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


def _by_split_and_class(scan: Scan) -> dict[str, dict[str, list[SliceFile]]]:
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
        "content": _digest(f"{_name(f)}\0{f.subject}\0{_content(f.path)}" for f in files),
        "names_and_sizes": names_and_sizes(files),
    }


def names_and_sizes(files: Sequence[SliceFile]) -> str:
    """SHA-256 over name, subject and size of the files of one split and class; none of them is opened."""
    return _digest(f"{_name(file)}\0{file.subject}\0{file.size}" for file in sorted(files, key=_name))


def _name(file: SliceFile) -> str:
    return PurePath(file.path).name


def _content(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
