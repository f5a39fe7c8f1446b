"""Files and folders that are on disk whole or not at all, and the check of an output folder.

A file is written under a temporary name beside its place, flushed to the disk and renamed. So is a folder (a
checkpoint, a latent cache); `commit_folder` lists the SHA-256 of its files in a record, against which
`find_damage` verifies it. A kill or a power cut at any moment leaves the earlier state or the new one.
"""

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adni_ldm.errors import UserError

_OLD = ".old.partial"  # ends the name of a folder that is being replaced
LOCK = ".lock"  # in a folder that a process writes to: see output_lock
CONTENT_PARTIAL = ".content.partial"  # in a folder to which files are being added


def check_empty_dir(folder: str | Path, flag: str = "--output_dir") -> None:
    """Raise UserError, with the name of `flag`, if `folder` is a file or not empty.

    What a killed process of ours left under temporary names does not count.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder}: a file of this name exists; choose another folder")
    content = folder.iterdir() if folder.exists() else ()
    if any(entry.name != LOCK and not entry.match(".*.partial") for entry in content):
        raise UserError(f"{flag} {folder} is not empty: remove it or choose another")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which becomes `path` when the block ends, unless it raises."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`, which replaces `path` when the block ends, unless it raises."""
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        _replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_content(folder: str | Path, last: str) -> Iterator[Path]:
    """Yield an empty folder whose entries move into `folder` when the block ends, unless it raises.

    They replace those of the same name. The file `last` is removed first and moved last: where it is found,
    the others are of the same writing.
    """
    folder = Path(folder)
    partial = folder / CONTENT_PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        flush_tree(partial)
        (folder / last).unlink(missing_ok=True)
        flush(folder)
        for entry in partial.iterdir():
            if entry.is_dir():
                _replace_folder(entry, folder / entry.name)
            elif entry.name != last:
                os.replace(entry, folder / entry.name)
        flush(folder)
        os.replace(partial / last, folder / last)
        flush(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what a kill left under temporary names in a folder that no other process writes to.

    Of a folder that was being replaced where the two cannot be exchanged, the earlier one is put back.
    """
    for old in Path(folder).glob(f"*{_OLD}"):
        if not (target := old.with_name(old.name.removesuffix(_OLD))).exists():
            os.replace(old, target)
    for partial in Path(folder).glob("*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file atomically: UTF-8, indented, a newline at its end."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path):
    """Read a UTF-8 JSON file. Raises OSError or ValueError."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def commit_folder(partial: Path, target: Path, record: str, content: Mapping[str, object]) -> None:
    """Rename the complete folder `partial` to `target` beside it, replacing an earlier one.

    The JSON file `record` in it gets `content`, and the size and SHA-256 of every file.
    """
    inside = sorted(partial.rglob("*"))
    files = {
        str(path.relative_to(partial)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in inside
        if path.is_file()
    }
    content = {**content, "files": files}
    (partial / record).write_text(json.dumps(content | {"sha256": _sha256_of(content)}, indent=1) + "\n")
    flush_tree(partial)
    _replace_folder(partial, target)


def find_damage(folder: Path, record: str) -> str | None:
    """Describe what is wrong with a folder that `commit_folder` wrote; None if every file is intact."""
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


def _replace_folder(partial: Path, target: Path) -> None:
    """Rename a folder to `target`, in one step where the system can exchange two folders (Linux)."""
    if not target.exists():
        os.replace(partial, target)
    elif _exchange(partial, target):
        flush(target.parent)
        shutil.rmtree(partial, ignore_errors=True)
    else:  # a kill between the two renames leaves the earlier one to `remove_leftovers`
        old = target.with_name(f"{target.name}{_OLD}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
        os.replace(partial, target)
        flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    flush(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders atomically; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and not rename(-100, os.fsencode(one), -100, os.fsencode(other), 2)


def flush_tree(folder: Path) -> None:
    """Flush a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
