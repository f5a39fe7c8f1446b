"""Folders that are on disk whole or not at all, and say so: checkpoints, and the cache of latents.

Such a folder is written under another name. `seal` notes the SHA-256 of its files, flushes all to the disk
and gives the folder its name, so that a kill or a power cut at any moment leaves it whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def commit_folder(partial: Path, target: Path, record: str, content: Mapping[str, object]) -> None:
    """Write `content` and the files' SHA-256 as the file `record`, flush all, rename the folder."""
    inside = sorted(partial.rglob("*"))
    files = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in inside
        if path.is_file()
    }
    content = {**content, "files": files}
    (partial / record).write_text(json.dumps(content | {"sha256": _sha256_of(content)}, indent=1) + "\n")
    for path in (*inside, partial / record, partial):
        _flush(path)
    old = target.with_name(f"{target.name}.old.partial")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(partial, target)
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def find_damage(folder: Path, record: str) -> str | None:
    """What is wrong with a sealed folder's files, in words; None where each is what was written."""
    try:
        content = json.loads((folder / record).read_text())
        written, files = content.pop("sha256"), content["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{record} cannot be read or lists no files"
    if written != _sha256_of(content):
        return f"{record} is not what was written, by its SHA-256"
    for name, written in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["bytes"]:
            return f"{name} has {file.stat().st_size} bytes of {written['bytes']}"
        if _sha256(file) != written["sha256"]:
            return f"{name} is not what was written, by its SHA-256"
    return None


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _sha256_of(progress: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
