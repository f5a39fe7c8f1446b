"""Many scans to pictures: in parallel, in shards, and however often it is stopped, the same bytes in the end.

    OUTPUT/.scans/plan.json          settings, scans, splits: what every shard of a job agrees on
    OUTPUT/.scans/volumes/KEY/       the pictures of one scan; the folder appears whole or not at all
    OUTPUT/.scans/rejected/KEY.json  why a scan has none

`convert_scans` fills this store, doing only what is missing; `merge_scans` makes a data folder of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd
from PIL import Image
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from adni_ldm.data.splits import assign_splits
from adni_ldm.errors import UserError
from adni_ldm.preprocessing.registration import Template, load_template
from adni_ldm.preprocessing.scan_to_slices import Method, make_pictures
from adni_ldm.preprocessing.study import Study, StudyScan
from adni_ldm.preprocessing.volumes import VolumeError

STORE = ".scans"
FORMAT = 1  # of the store; goes up when the same settings come to make other pictures


@dataclasses.dataclass(frozen=True)
class _Job:
    """What a worker needs beside the scan itself; handed over once."""

    input_dir: Path
    store: Path
    partial: Path  # of this shard alone
    method: Method
    template: Template | None


_job: _Job | None = None  # of a worker process


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers, after the scans in hand
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run leaves no workers that write on."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _convert(scan: StudyScan, job: _Job | None = None) -> bool:
    """Put one scan's pictures, or the reason why it has none, into the store; whether it has any."""
    job = job or _job
    source = job.input_dir / scan.path
    why = job.store / "rejected" / f"{scan.key}.json"
    partial = job.partial / scan.key
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        try:
            pictures = make_pictures(source, job.method, job.template)
        except (VolumeError, MemoryError) as error:
            reason = str(error) or "it needs more memory than there is"
            write_json(partial / "why.json", {"reason": reason})
            os.replace(partial / "why.json", why)
            return False
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(partial / f"{number:02d}.png", compress_level=1)
        write_json(partial / "record.json", {"bytes": _size(source), "slices": len(pictures)})
        final = job.store / "volumes" / scan.key
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        why.unlink(missing_ok=True)
        return True
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _size(source: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(p.stat().st_size for p in (source.iterdir() if source.is_dir() else [source]) if p.is_file())


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------- all scans


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N", 1 <= I <= N. Raises UserError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard {text}: expected I/N, such as 1/8 for the first of eight")
    return int(part), int(parts)


def earlier_splits(output_dir: str | Path) -> dict[str, str]:
    """{subject: split} of the runs before, {} for a first one. Raises UserError for a folder of others."""
    output_dir = Path(output_dir)
    plan = output_dir / STORE / "plan.json"
    if plan.is_file():
        return read_json(plan)["splits"]
    foreign = [p.name for p in output_dir.iterdir() if p.name != STORE] if output_dir.is_dir() else []
    if foreign:
        raise UserError(f"{output_dir} holds {foreign[0]}, not made by this command: choose another folder")
    return {}


def decide_splits(
    people: pd.DataFrame,  # of a Study
    earlier: Mapping[str, str],
    val_fraction: float,
    test_fraction: float,
    test_subjects: Collection[str] | None = None,  # exactly these are the test set; None: a share of all
) -> dict[str, str]:
    """{subject: split} of all people. Nobody leaves the split of an earlier run.

    Raises UserError for fractions that leave no training set, and where `test_subjects` contradict `earlier`.
    """
    if not (0 <= val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise UserError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: leave some for training"
        )
    fractions = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    fixed = dict(earlier)
    if test_subjects is not None:
        wanted = {s for s in people.subject if s in test_subjects or s.removeprefix("sub-") in test_subjects}
        moved = sorted(s for s in people.subject if s in earlier and (earlier[s] == "test") != (s in wanted))
        if moved or not wanted:
            what = (
                f"{moved[0]} was in {earlier[moved[0]]} before" if moved else "none is in the study's table"
            )
            raise UserError(f"test subjects: {what}; correct the list, or choose another --output_dir")
        fixed |= dict.fromkeys(wanted, "test")
        fractions = {"train": 1 - val_fraction, "val": val_fraction}
    return assign_splits(people, {k: share for k, share in fractions.items() if share > 0}, fixed)


def convert_scans(
    study: Study,
    splits: Mapping[str, str],  # subject: train, val or test
    input_dir: str | Path,
    output_dir: str | Path,
    method: Method,
    workers: int | None = None,  # None: one a CPU
    shard: tuple[int, int] = (1, 1),
    settings: Mapping | None = None,  # for manifest.json, beside the method
) -> int:
    """Fill output_dir's store with the pictures of this shard's scans; how many had none yet.

    Raises UserError where the folder cannot be written, was made with other settings, or a worker died. What
    is done by then stays, and the same call goes on from there.
    """
    store = Path(output_dir) / STORE
    workers = os.cpu_count() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers={workers}: choose 1 or more")
    part, parts = shard
    partial = store / f"partial-{part}-{parts}"
    try:
        for folder in (store / "volumes", store / "rejected", partial):
            folder.mkdir(parents=True, exist_ok=True)
        _write_plan(store, partial, study, splits, method, settings or {})
        scans = [
            scan for scan in study.scans[part - 1 :: parts] if not _is_done(store, Path(input_dir), scan)
        ]
        template = load_template() if scans and method.needs_template else None
        job = _Job(Path(input_dir), store, partial, method, template)
        for _ in tqdm(_run(scans, job, workers), total=len(scans), desc="scans", unit="scan"):
            pass
    except OSError as error:  # what concerns a scan is a VolumeError by now
        raise UserError(
            f"{output_dir}: cannot be written ({error.strerror or error}); mend that and run the same "
            "command again: it goes on where it was"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, for want of memory perhaps: run the same command again, with fewer "
            "--workers; it goes on where it was"
        ) from error
    shutil.rmtree(partial, ignore_errors=True)
    return len(scans)


def _run(scans: Sequence[StudyScan], job: _Job, workers: int) -> Iterator[bool]:
    if workers == 1 or len(scans) < 2:
        yield from map(functools.partial(_convert, job=job), scans)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with ProcessPoolExecutor(min(workers, len(scans)), spawn, _start_worker, (job,)) as pool:
        yield from pool.map(_convert, scans)


def _write_plan(store: Path, partial: Path, study: Study, splits, method: Method, settings: Mapping) -> None:
    """Leave the plan for merge_scans. Raises UserError where the store has pictures of another method."""
    made_by = {"format": FORMAT, **dataclasses.asdict(method), "percentiles": list(method.percentiles)}
    if (store / "plan.json").is_file():
        earlier = read_json(store / "plan.json")["method"]
        if changed := [f"{k} {earlier.get(k)}, now {v}" for k, v in made_by.items() if earlier.get(k) != v]:
            raise UserError(
                f"{store.parent} was made with other settings ({'; '.join(changed)}): "
                "choose another --output_dir"
            )
    plan = {
        "method": made_by,
        "settings": dict(settings),
        "splits": dict(sorted(splits.items())),
        "scans": [dataclasses.asdict(scan) for scan in study.scans],
        "rejected": [dataclasses.asdict(entry) for entry in study.rejected],
    }
    write_json(partial / "plan.json", plan)
    os.replace(partial / "plan.json", store / "plan.json")


def _is_done(store: Path, input_dir: Path, scan: StudyScan) -> bool:
    """Whether the store has the pictures of the scan as it is now. One that was rejected is tried again."""
    record = store / "volumes" / scan.key / "record.json"
    try:
        return read_json(record)["bytes"] == _size(input_dir / scan.path)
    except FileNotFoundError:
        return False
