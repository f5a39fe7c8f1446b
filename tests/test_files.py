"""Files and folders are whole or absent, wherever the process that writes them is killed or power is cut."""

import os
import sys
from pathlib import Path

import pytest

from adni_ldm import files
from adni_ldm.files import atomic_content, atomic_file, atomic_folder, commit_folder, find_damage

sys.path.insert(0, str(Path(__file__).parent / "faults"))
from power_cuts import cut_power, record_flushes  # noqa: E402


def killed_at(moment: int, write, log: Path) -> bool:
    """Whether a process that writes was killed before its change number `moment` to the disk."""

    def counted(change):
        def change_unless_killed(*args, **options):
            count[0] += 1
            if count[0] > moment:
                os._exit(9)
            return change(*args, **options)

        return change_unless_killed

    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    count = [0]
    try:
        os.fsync = lambda _file: None  # noted below, and slow
        record_flushes(log)
        for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        files._exchange = counted(files._exchange)
        write()
        os._exit(0)
    finally:
        os._exit(1)


def write_model(folder: Path, version: str) -> None:
    for name in ("vae", "unet"):
        (folder / name).mkdir()
        (folder / name / "weights").write_text(version * 100)
    (folder / "index.json").write_text(version * 10)


def versions(folder: Path) -> set[str]:
    """What the model in a folder consists of: one version, if it is whole; empty without an index."""
    if not (folder / "index.json").is_file():
        return set()
    texts = [(folder / name / "weights").read_text() for name in ("vae", "unet")]
    assert all(len(text) == 100 for text in texts)
    return {text[:1] for text in (*texts, (folder / "index.json").read_text())}


@pytest.fixture(params=["exchanged", "renamed twice"])
def system(request, monkeypatch):
    """Linux; and a system, or a network file system, that cannot exchange two folders."""
    if request.param == "renamed twice":
        monkeypatch.setattr(files, "_exchange", lambda *_names: False)
    return request.param


@pytest.mark.parametrize("power_cut", [False, True])
@pytest.mark.parametrize("way", ["folder", "content", "commit"])
def test_a_replaced_model_is_the_old_one_or_the_new_one(system, way, power_cut, tmp_path):
    """The process is killed before each of its changes in turn, and starts again with what it finds."""

    def write(version: str) -> None:
        if way == "folder":
            with atomic_folder(place / "model") as partial:
                write_model(partial, version)
        elif way == "content":
            with atomic_content(place / "model", last="index.json") as partial:
                write_model(partial, version)
        else:
            partial = place / "model.partial"
            partial.mkdir()
            write_model(partial, version)
            commit_folder(partial, place / "model", "record.json", {"version": version})

    found = []
    for moment in range(200):
        place, log = tmp_path / str(moment), tmp_path / f"{moment}.log"
        place.mkdir()
        assert not killed_at(10**6, lambda: write("a"), log)
        killed = killed_at(moment, lambda: write("b"), log)
        if power_cut:
            cut_power(place, log)
        if system == "exchanged" and way != "content":
            assert versions(place / "model"), "found at any moment, and not only by the next run"
        files.remove_leftovers(place)
        files.remove_leftovers(place / "model")
        state = versions(place / "model")
        assert state in ({"a"}, {"b"}) or (way == "content" and state == set()), moment
        if way == "commit":
            assert find_damage(place / "model", "record.json") is None
        found.append("".join(state))
        assert not list(place.glob("*.partial"))
        if not killed:
            break
        write("c")
        assert versions(place / "model") == {"c"} and not list(place.rglob("*.partial"))
    assert found[0] == "a" and found[-1] == "b" and len(found) > 8


def test_a_file_is_flushed_before_it_has_its_name(tmp_path):
    def write() -> None:
        with atomic_file(tmp_path / "metrics.json") as partial:
            partial.write_text("whole")
        (tmp_path / "notes.txt").write_text("not flushed")

    assert not killed_at(10**6, write, tmp_path / "log")
    assert cut_power(tmp_path, tmp_path / "log") == 1, "the disk does lose what was not flushed"
    assert (tmp_path / "metrics.json").read_text() == "whole" and not (tmp_path / "notes.txt").read_text()


def test_content_beside_the_model_stays(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.csv").write_text("step")
    with pytest.raises(KeyboardInterrupt), atomic_content(tmp_path, last="index.json") as partial:
        write_model(partial, "a")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.csv"]
    with atomic_content(tmp_path, last="index.json") as partial:
        write_model(partial, "a")
    assert versions(tmp_path) == {"a"} and (tmp_path / "metrics.csv").read_text() == "step"
