"""Many scans to slices: in parallel, resumable, and with the same bytes however often it was interrupted.

    OUTPUT/.scans/plan.json          slicing settings and splits, which later runs must agree with
    OUTPUT/.scans/volumes/KEY/       the slices of one scan; the folder is written atomically
    OUTPUT/.scans/rejected/KEY.json  why a scan could not be used

`convert_scans` adds what is missing to this store, then `assembly` makes the data folder of it.
"""

import functools
import os
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from adni_ldm.data.splits import assign_splits
from adni_ldm.errors import UserError
from adni_ldm.files import commit_folder, read_json, remove_leftovers, write_json
from adni_ldm.output_lock import OutputLock
from adni_ldm.preprocessing.assembly import DataFolder, assemble
from adni_ldm.preprocessing.registration import Template, load_template
from adni_ldm.preprocessing.scan_to_slices import slice_scan
from adni_ldm.preprocessing.slicing import SlicingSettings
from adni_ldm.preprocessing.study import Study, StudyScan
from adni_ldm.preprocessing.volumes import VolumeError
from adni_ldm.preprocessing.workers import run_tasks

STORE = ".scans"
FORMAT = 1  # of the store; increase it when the same settings come to give other slices


def earlier_splits(output_dir: str | Path) -> dict[str, str]:
    """Return {subject: split} of earlier runs, {} before the first. Raises UserError for another folder."""
    output_dir = Path(output_dir)
    plan = output_dir / STORE / "plan.json"
    if plan.is_file():
        return read_json(plan)["splits"]
    foreign = [p.name for p in output_dir.iterdir() if p.name != STORE] if output_dir.is_dir() else []
    if foreign:
        raise UserError(f"{output_dir} holds {foreign[0]}, not made by this command: choose another folder")
    return {}


def decide_splits(
    subjects: pd.DataFrame,  # of a Study
    earlier: Mapping[str, str],
    val_fraction: float,
    test_fraction: float,
    test_subjects: Collection[str] | None = None,  # exactly these are the test set; None: a fraction of all
) -> dict[str, str]:
    """Return {subject: split} of all subjects; no subject leaves the split of an earlier run.

    Raises UserError if the fractions leave no training set, or `test_subjects` contradict `earlier`.
    """
    if not (0 <= val_fraction and 0 <= test_fraction and val_fraction + test_fraction < 1):
        raise UserError(
            f"val_fraction={val_fraction}, test_fraction={test_fraction}: leave some for training"
        )
    fractions = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    fixed, names = dict(earlier), subjects.subject
    if test_subjects is not None:
        wanted = {s for s in names if s in test_subjects or s.removeprefix("sub-") in test_subjects}
        moved = sorted(s for s in names if s in earlier and (earlier[s] == "test") != (s in wanted))
        if moved or not wanted:
            what = f"{moved[0]} was in {earlier[moved[0]]} before" if moved else "none is in the study table"
            raise UserError(f"test subjects: {what}; correct the list, or choose another --output_dir")
        fixed |= dict.fromkeys(wanted, "test")
        fractions = {"train": 1 - val_fraction, "val": val_fraction}
    return assign_splits(subjects, {split: share for split, share in fractions.items() if share > 0}, fixed)


def _convert(
    scan: StudyScan, input_dir: Path, store: Path, slicing: SlicingSettings, template: Template | None
) -> None:
    """Store the slices of one scan, or the reason why it has none."""
    source = input_dir / scan.path
    rejection = store / "rejected" / f"{scan.key}.json"
    try:
        slices = slice_scan(source, slicing, template)
    except (VolumeError, MemoryError) as error:
        write_json(rejection, {"reason": str(error) or "not enough memory"})
        return
    partial = store / "partial" / scan.key
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for number, pixels in enumerate(slices):
            Image.fromarray(pixels).save(partial / f"{number:02d}.png", compress_level=1)
        record = {"bytes": _size(source), "slices": len(slices)}
        commit_folder(partial, store / "volumes" / scan.key, "record.json", record)
        rejection.unlink(missing_ok=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _size(source: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(p.stat().st_size for p in (source.iterdir() if source.is_dir() else [source]) if p.is_file())


def convert_scans(
    study: Study,
    splits: Mapping[str, str],  # subject: train, val or test
    input_dir: str | Path,
    output_dir: str | Path,
    slicing: SlicingSettings,
    workers: int | None = None,  # None: one per CPU
    settings: Mapping | None = None,  # for manifest.json, beside those of slicing
) -> DataFolder:
    """Convert the scans that have no slices yet, and make the data folder of all.

    Raises UserError if the folder cannot be written, was made with other settings or is left without any
    slice, or a worker was killed. What is done by then stays, and the same call resumes.
    """
    input_dir, output_dir = Path(input_dir), Path(output_dir)
    store = output_dir / STORE
    workers = os.cpu_count() if workers is None else workers
    if workers < 1:
        raise UserError(f"workers={workers}: choose 1 or more")
    try:
        lock = OutputLock(store)
        for folder in (output_dir, store, store / "volumes", store / "rejected"):
            folder.mkdir(exist_ok=True)
            remove_leftovers(folder)
        _write_plan(store, splits, slicing)
        scans = [scan for scan in study.scans if not _is_done(store, input_dir, scan)]
        template = load_template() if scans and slicing.needs_template else None
        shared = {"input_dir": input_dir, "store": store, "slicing": slicing, "template": template}
        converted = run_tasks(functools.partial(_convert, **shared), scans, workers)
        for _ in tqdm(converted, total=len(scans), desc="scans", unit="scan"):
            pass
        shutil.rmtree(store / "partial", ignore_errors=True)
        folder = assemble(store, study, splits, slicing, settings or {})
        lock.release()
        return folder
    except OSError as error:  # problems of a scan are VolumeErrors
        raise UserError(
            f"{output_dir}: cannot be written ({error.strerror or error}); correct that and run the same "
            "command again to resume"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: run the same command again, with fewer "
            "--workers, to resume"
        ) from error


def _write_plan(store: Path, splits: Mapping[str, str], slicing: SlicingSettings) -> None:
    """Record settings and splits for later runs. Raises UserError if the store has other settings."""
    made_by = {"format": FORMAT, **slicing.as_dict()}
    plan = store / "plan.json"
    if plan.is_file():
        earlier = read_json(plan)["method"]
        if changed := [f"{k} {earlier.get(k)}, now {v}" for k, v in made_by.items() if earlier.get(k) != v]:
            raise UserError(
                f"{store.parent} was made with other settings ({'; '.join(changed)}): "
                "choose another --output_dir"
            )
    write_json(plan, {"method": made_by, "splits": dict(sorted(splits.items()))})


def _is_done(store: Path, input_dir: Path, scan: StudyScan) -> bool:
    """Whether the store has the slices of the scan as it is now. A rejected scan is tried again."""
    record = store / "volumes" / scan.key / "record.json"
    return record.is_file() and read_json(record)["bytes"] == _size(input_dir / scan.path)
