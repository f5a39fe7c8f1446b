"""Zips of slices, unpacked into the cache, and the folders of caches that hold copies of the data."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from datasets import config

from adni_ldm.data.splits import DataError

# Archives are untrusted. Images hardly shrink when they are packed.
MOST_UNPACKED = 100  # times the size of the archive


def cache_dir(name: str) -> Path:
    """A folder below the cache of Hugging Face datasets that only its owner may read; made where missing."""
    top = Path(config.HF_DATASETS_CACHE, "adni_ldm")
    for folder in (top, top / name):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return top / name


def open_data_dir(data_dir: str | Path) -> Path:
    """Return the folder to read: `data_dir`, or the one in the cache that a zip is unpacked to.

    That folder is named by the zip's SHA-256, and holds the zip's members and nothing else.

    Raises:
        DataError: the file is not a zip or is damaged, or a member would be outside the folder, is a link, or
            grows out of proportion; nothing is unpacked then.
    """
    path = Path(data_dir).expanduser()
    if not path.is_file():
        return path
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(file) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                _check_archive(path, members)
                folder = cache_dir("unpacked") / digest
                if not _holds(folder, members):
                    _unpack(archive, members, folder)
    except DataError:
        raise
    except Exception as error:  # of a damaged file, zipfile raises nearly any
        raise DataError(f"{path}: not a zip file, or a damaged one ({error}); download it again") from error
    return folder


def _check_archive(path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise DataError(f"{path}: does not begin like a zip file; pack it again")
    for member in members:
        posix, windows = PurePosixPath(member.filename), PureWindowsPath(member.filename)
        if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
            raise DataError(
                f"{path}: {member.filename} would be unpacked outside the folder; do not trust it"
            )
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DataError(f"{path}: {member.filename} is a link; pack it again with the files themselves")
    size, packed = sum(member.file_size for member in members), path.stat().st_size
    if size > MOST_UNPACKED * packed:
        raise DataError(
            f"{path}: its {packed / 1e6:.1f} MB would become {size / 1e6:.0f} MB, unlike any images; do not "
            "trust it, or unpack it yourself and give the folder"
        )


def _holds(folder: Path, members: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether a folder holds files of the members' names and sizes, and no others."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    return found == {os.path.normpath(member.filename): member.file_size for member in members}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _unpack(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    """Unpack into a folder that only its owner may read, whole or not at all."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))  # mode 0700
    try:
        for member in members:
            archive.extract(member, partial)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            partial.rename(folder)
        except OSError:
            if not _holds(folder, members):  # another process has just unpacked the same zip
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
