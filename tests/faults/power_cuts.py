"""A disk that loses at a power cut what was not flushed: files are cut back to what fsync had reached.

A stand-in for dm-log-writes, which needs a block device of its own. It loses data, and no names: a rename is
kept though the file behind it is empty, as on ext4 without a flush before the rename.
"""

import os
from pathlib import Path


def record_flushes(log: Path) -> None:
    """Let `os.fsync` of this process, and of its forks, note in `log` what it has flushed."""
    flush, note = os.fsync, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def flush_and_note(file):
        before = os.fstat(file)
        flush(file)
        os.write(note, f"{before.st_ino} {before.st_mtime_ns} {before.st_size}\n".encode())

    os.fsync = flush_and_note


def cut_power(folder: Path, log: Path) -> int:
    """Cut every file of a folder back to what was flushed; returns how many were cut."""
    flushed = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        inode, written_at, size = map(int, line.split())
        flushed.setdefault(inode, {})[written_at] = size
    lost = 0
    for path in folder.rglob("*"):
        state = path.lstat()
        if not path.is_file() or path.is_symlink() or path == log or state.st_size == 0:
            continue
        sizes = flushed.get(state.st_ino, {})
        if sizes.get(state.st_mtime_ns) != state.st_size:
            # An inode is used again after its file is deleted: a larger size is not of this file.
            known = [size for size in sizes.values() if size < state.st_size]
            os.truncate(path, max(known, default=0))
            lost += 1
    return lost
