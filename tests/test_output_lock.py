"""A folder is written by one process; the lock ends with its holder, however that ends."""

import json
import os
import signal
import socket
import sys
import time

import pytest
from accelerate.state import AcceleratorState

import evaluate
import train_ldm
from adni_ldm import output_lock
from adni_ldm.errors import UserError
from adni_ldm.output_lock import OutputLock


def test_the_second_process_is_refused_by_the_name_of_the_first(held_by_another, tmp_path):
    with held_by_another(tmp_path / "run") as holder, pytest.raises(UserError) as error:
        OutputLock(tmp_path / "run")
    assert f"run is being written by process {holder} on {socket.gethostname()}, since " in str(error.value)
    assert "\n" not in str(error.value)


def test_it_ends_with_its_holder_whose_forks_do_not_keep_it(held_by_another, tmp_path):
    """Workers that read slices ahead outlive a killed run by seconds."""
    with held_by_another(tmp_path, fork=True) as holder:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        assert (tmp_path / ".lock").is_file()
        start = time.monotonic()
        lock = OutputLock(tmp_path)
        assert time.monotonic() - start < output_lock.LEASE / 3, "no lease to wait for on this host"
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
        lock.release()
        lock.release()
    assert not list(tmp_path.iterdir())


def write_as_another_host(folder, renewed):
    record = {"host": "elsewhere", "process": 7, "since": "then", "renewed": renewed}
    (folder / ".lock").write_text(json.dumps(record).ljust(512))


def test_where_locks_are_local_a_lease_that_is_renewed_counts(tmp_path, monkeypatch):
    """Another host's record, and no lock of it to be seen, as on a mount with `local_lock`."""
    monkeypatch.setattr(output_lock, "LEASE", 2.0)
    write_as_another_host(tmp_path, 0)
    pid = os.fork()
    if pid == 0:
        time.sleep(0.5)
        write_as_another_host(tmp_path, 1)
        os._exit(0)
    with pytest.raises(UserError, match="written by process 7 on elsewhere, since then"):
        OutputLock(tmp_path)
    os.waitpid(pid, 0)
    OutputLock(tmp_path).release()  # that host died: its lease ends


def test_the_holder_renews_its_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "RENEWAL", 0.05)
    lock = OutputLock(tmp_path)
    end = time.monotonic() + 30
    while json.loads(os.pread(lock.file, 512, 0))["renewed"] < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    lock.release()


def test_a_training_run_is_refused_before_it_reads_data(held_by_another, monkeypatch, tmp_path):
    words = ["--data_dir", "no/such/folder", "--vae", tmp_path / "vae", "--output_dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["train_ldm.py", *map(str, words), "--report_to", "none"])
    monkeypatch.setattr(train_ldm, "load_autoencoder", None)  # not reached
    AcceleratorState._reset_state(True)
    with held_by_another(tmp_path / "run"), pytest.raises(UserError, match="run is being written by process"):
        train_ldm.main()
    AcceleratorState._reset_state(True)


def test_a_report_is_refused_before_it_reads_samples(held_by_another, monkeypatch, tmp_path):
    words = ["--samples", tmp_path / "none", "--output_dir", tmp_path / "report"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    with held_by_another(tmp_path / "report"), pytest.raises(UserError, match="report is being written by"):
        evaluate.main()
    with pytest.raises(UserError, match="none: no such folder"):
        evaluate.main()
