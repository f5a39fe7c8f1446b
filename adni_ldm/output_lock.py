"""One process writes to an output folder at a time.

`FOLDER/.lock` names the process that holds the folder and has a POSIX lock, which the system releases when
the process ends, however it ends, and which its forks do not inherit. On NFS the server keeps the lock, and
releases that of a dead host with its lease (about 90 s). A mount may keep locks to each host (`nolock`,
`local_lock`), and some file systems have none. There the file itself is the lease: its holder renews it every
ten seconds, and a process of another host takes the folder once it has not been renewed for half a minute.
"""

import atexit
import errno
import fcntl
import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread

from adni_ldm.errors import UserError
from adni_ldm.files import LOCK

RENEWAL, LEASE = 10.0, 30.0  # seconds
_BYTES = 512  # of the record, which is written in one piece


class OutputLock:
    """Holds a folder until `release`, or the end of the process.

    Raises UserError, with the host and process that hold it, if another process does.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.path = Path(folder), Path(folder) / LOCK
        self.created = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        works = self._lock()
        holder = self._read()
        if holder and (holder["host"] != socket.gethostname() or not works):
            self._wait_for_lease(holder)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.record = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "renewed": 0}
        self._write()
        self._released = Event()
        Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Let other processes have the folder; without effect the second time, or in a fork."""
        if self._released.is_set() or os.getpid() != self.record["process"]:
            return
        self._released.set()
        if self._is_named():
            self.path.unlink(missing_ok=True)
        os.close(self.file)
        if self.created and not any(self.folder.iterdir()):  # refused for another reason, nothing was written
            self.folder.rmdir()

    def _lock(self) -> bool:
        """Lock the file under its name. Returns False where the file system has no locks."""
        while True:
            self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return False
                self._refuse(self._read())
            if self._is_named():
                return True
            os.close(self.file)  # its holder has removed it in between

    def _wait_for_lease(self, holder: dict) -> None:
        """Take the folder of another host if that does not renew its lease."""
        end = time.monotonic() + LEASE
        while time.monotonic() < end:
            time.sleep(min(1.0, LEASE / 10))
            try:  # a new lock, so that an NFS client reads the file anew
                fcntl.lockf(self.file, fcntl.LOCK_UN)
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    self._refuse(self._read())
            if (now := self._read()) != holder:
                self._refuse(now)

    def _refuse(self, holder: dict | None) -> None:
        os.close(self.file)
        who = "process {process} on {host}, since {since}".format(**holder) if holder else "another process"
        raise UserError(
            f"{self.folder} is being written by {who}: wait until it ends, end it, or choose another folder"
        )

    def _is_named(self) -> bool:
        """Whether the locked file is the one that others would find."""
        try:
            return os.stat(self.path).st_ino == os.fstat(self.file).st_ino
        except FileNotFoundError:
            return False

    def _read(self) -> dict | None:
        """The record of the file, by its open descriptor: closing another one would release the lock."""
        try:
            record = json.loads(os.pread(self.file, _BYTES, 0))
            return record if {"host", "process", "since", "renewed"} <= record.keys() else None
        except (OSError, ValueError, AttributeError):
            return None

    def _write(self) -> None:
        os.pwrite(self.file, json.dumps(self.record).ljust(_BYTES).encode(), 0)
        os.fsync(self.file)

    def _renew(self) -> None:
        while not self._released.wait(RENEWAL):
            self.record["renewed"] += 1
            try:
                self._write()
            except OSError:  # a full disk, or a server that is away: the next time
                continue
