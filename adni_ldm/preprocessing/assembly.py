"""From the store of all shards to a data folder: pictures in their splits, metadata.csv, rejected.csv.

The store keeps its pictures, and the data folder has hard links to them, which take no room of their own.
Keep .scans to add scans later; a finished folder trains as well without it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from adni_ldm.data.manifest import MANIFEST, write_manifest
from adni_ldm.data.splits import SPLITS
from adni_ldm.errors import UserError
from adni_ldm.preprocessing.conversion import STORE, read_json
from adni_ldm.preprocessing.scan_to_slices import Method

METADATA = (
    "file_name",  # relative to the folder of its split
    "label",
    "subject",
    "session",
    "image_id",
    "age",
    "sex",
    "slice",  # 0, 1 ... in the order of slice_mm
    "slice_mm",  # along the normal: from the middle of the brain, or where registered in MNI152
    "plane",
    "pixel_mm",
)
REJECTED = ("path", "subject", "image_id", "reason")


@dataclasses.dataclass(frozen=True)
class Merged:
    """What a data folder came to hold. `table` has the rows of all metadata.csv and a column `split`."""

    table: pd.DataFrame
    rejected: pd.DataFrame  # columns of REJECTED; also in rejected.csv, where there are any
    hash: str  # of the manifest


def merge_scans(output_dir: str | Path) -> Merged:
    """Make output_dir/{train,val,test} of its store, in one move a split; what was there before is replaced.

    Raises UserError where there is no store, where some shard has not finished, and where nothing is left.
    """
    output_dir = Path(output_dir)
    store = output_dir / STORE
    if not (store / "plan.json").is_file():
        raise UserError(f"{output_dir}: no scans were prepared there; run prepare_data.py scans first")
    plan = read_json(store / "plan.json")
    method = Method(**{k: v for k, v in plan["method"].items() if k != "format"})
    reasons, missing = {}, []
    for scan in plan["scans"]:
        if (why := store / "rejected" / f"{scan['key']}.json").is_file():
            reasons[scan["key"]] = read_json(why)["reason"]
        elif not (store / "volumes" / scan["key"] / "record.json").is_file():
            missing.append(scan["key"])
    if missing:
        raise UserError(
            f"{output_dir}: {len(missing)} of {len(plan['scans'])} scans are not done ({missing[0]} ...): "
            "run all shards to their end, then merge"
        )
    rejected = _rejected(plan, reasons)
    rows = [row for scan in plan["scans"] if scan["key"] not in reasons for row in _rows(scan, plan, method)]
    try:
        _write_rejected(output_dir, rejected)
        if not rows:
            raise UserError(f"{output_dir}: no scan could be used; rejected.csv there has the reasons")
        table = pd.DataFrame(rows)
        _build(store, table)
        _swap(output_dir, store)
        settings = {k: v for k, v in plan["method"].items() if k != "format"} | plan["settings"]
        digest = write_manifest(output_dir, settings)
    except OSError as error:
        raise UserError(
            f"{output_dir}: cannot be written ({error.strerror or error}); merge again"
        ) from error
    return Merged(table.drop(columns=["key"]), rejected, digest)


def _rows(scan: Mapping, plan: Mapping, method: Method) -> list[dict]:
    """The rows of metadata.csv of one scan, with its split and key."""
    return [
        {
            "file_name": f"{scan['label']}/{scan['key']}_{number:02d}.png",
            **{name: scan[name] for name in ("label", "subject", "session", "image_id", "age", "sex")},
            "slice": number,
            "slice_mm": round(slice_mm, 2),
            "plane": method.plane,
            "pixel_mm": method.view.pixel_mm,
            "split": plan["splits"][scan["subject"]],
            "key": scan["key"],
        }
        for number, slice_mm in enumerate(method.slices_mm)
    ]


def _rejected(plan: Mapping, reasons: Mapping[str, str]) -> pd.DataFrame:
    entries = [*plan["rejected"]]
    entries += [scan | {"reason": reasons[scan["key"]]} for scan in plan["scans"] if scan["key"] in reasons]
    table = pd.DataFrame([{name: entry[name] for name in REJECTED} for entry in entries], columns=REJECTED)
    return table.sort_values(list(REJECTED), ignore_index=True)


def _write_rejected(output_dir: Path, rejected: pd.DataFrame) -> None:
    path = output_dir / "rejected.csv"
    if rejected.empty:
        path.unlink(missing_ok=True)
        return
    rejected.to_csv(output_dir / STORE / "rejected.csv", index=False)
    os.replace(output_dir / STORE / "rejected.csv", path)


def _build(store: Path, table: pd.DataFrame) -> None:
    """The splits below store/merged, complete but for their place."""
    merged = store / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    for split, part in table.groupby("split"):
        for label in sorted(set(part.label)):
            (merged / split / label).mkdir(parents=True)
        for row in part.itertuples():
            _link(store / "volumes" / row.key / f"{row.slice:02d}.png", merged / split / row.file_name)
        part.to_csv(merged / split / "metadata.csv", index=False, columns=METADATA)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _swap(output_dir: Path, store: Path) -> None:
    """The splits of store/merged in the place of those before. Killed in between, the next merge mends it."""
    old = store / "old"
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    (output_dir / MANIFEST).unlink(missing_ok=True)  # it is not about what comes
    for split in SPLITS:
        if (output_dir / split).exists():
            os.rename(output_dir / split, old / split)
        if (store / "merged" / split).exists():
            os.rename(store / "merged" / split, output_dir / split)
    for folder in (old, store / "merged", *store.glob("partial-*")):
        shutil.rmtree(folder, ignore_errors=True)
