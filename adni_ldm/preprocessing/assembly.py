"""The last step of `convert_scans`: a data folder of slices in their splits, metadata.csv and rejected.csv.

The store keeps its slices; those of the data folder are hard links to them, which take no room of their own.
Keep .scans to add scans later; training does not need it.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from adni_ldm.data.cells import escape_table
from adni_ldm.data.manifest import MANIFEST, write_manifest
from adni_ldm.data.splits import SPLITS
from adni_ldm.errors import UserError
from adni_ldm.files import atomic_file, flush_tree, read_json
from adni_ldm.preprocessing.slicing import CENTRE_MM, PLANES, SlicingSettings
from adni_ldm.preprocessing.study import Study, StudyScan

METADATA = (
    "file_name",  # relative to the folder of its split
    "label",
    "subject",
    "session",
    "image_id",
    "age",
    "sex",
    "slice",  # 0, 1 ... in the order of slice_mm
    "slice_mm",  # along the normal: from the centre of the brain, or in MNI152 where registered
    "plane",
    "pixel_mm",
)
REJECTED = ("path", "subject", "image_id", "reason")


@dataclasses.dataclass(frozen=True)
class DataFolder:
    """What a data folder holds. `table` has the rows of all metadata.csv and a column `split`."""

    table: pd.DataFrame
    rejected: pd.DataFrame  # columns of REJECTED; also in rejected.csv, if there are any


def assemble(
    store: Path, study: Study, splits: Mapping[str, str], slicing: SlicingSettings, settings: Mapping
) -> DataFolder:
    """Replace {train,val,test} beside `store` by folders of its slices; `settings` go to manifest.json.

    Raises UserError if no scan could be used, and OSError if the folder cannot be written.
    """
    output_dir = store.parent
    rejected, rows = [dataclasses.asdict(entry) for entry in study.rejected], []
    for scan in study.scans:
        if (rejection := store / "rejected" / f"{scan.key}.json").is_file():
            rejected.append(dataclasses.asdict(scan) | read_json(rejection))  # its reason
        else:
            rows += _rows(scan, splits, slicing)
    rejected = pd.DataFrame(rejected, columns=REJECTED).sort_values(list(REJECTED), ignore_index=True)
    if rejected.empty:
        (output_dir / "rejected.csv").unlink(missing_ok=True)
    else:
        with atomic_file(output_dir / "rejected.csv") as partial:
            escape_table(rejected).to_csv(partial, index=False)
    if not rows:
        raise UserError(f"{output_dir}: no scan could be used; rejected.csv there has the reasons")
    table = pd.DataFrame(rows)
    _link_slices(store, table)
    _replace_splits(output_dir, store)
    write_manifest(output_dir, slicing.as_dict() | dict(settings))
    return DataFolder(table[[*METADATA, "split"]], rejected)


def _rows(scan: StudyScan, splits: Mapping[str, str], slicing: SlicingSettings) -> list[dict]:
    """The rows of metadata.csv of one scan, with its split and key."""
    origin_mm = CENTRE_MM[PLANES[slicing.plane][0]] if slicing.register == "mni" else 0.0
    common = dataclasses.asdict(scan) | {"plane": slicing.plane, "pixel_mm": slicing.pixel_mm}
    common["split"] = splits[scan.subject]
    return [
        common
        | {"file_name": f"{scan.label}/{scan.key}_{number:02d}.png"}
        | {"slice": number, "slice_mm": round(float(origin_mm + position), 2)}
        for number, position in enumerate(slicing.positions_mm)
    ]


def _link_slices(store: Path, table: pd.DataFrame) -> None:
    """Write the splits to store/merged."""
    merged = store / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    for split, part in table.groupby("split"):
        for label in sorted(set(part.label)):
            (merged / split / label).mkdir(parents=True)
        for row in part.itertuples():
            source = store / "volumes" / row.key / f"{row.slice:02d}.png"
            target = merged / split / row.file_name
            try:
                os.link(source, target)
            except OSError:  # a file system without hard links
                shutil.copyfile(source, target)
        escape_table(part).to_csv(merged / split / "metadata.csv", index=False, columns=METADATA)
    flush_tree(merged)


def _replace_splits(output_dir: Path, store: Path) -> None:
    """Replace the splits by those of store/merged. If this is killed, the next run repairs it."""
    old = store / "old"
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    (output_dir / MANIFEST).unlink(missing_ok=True)  # it describes the earlier splits
    for split in SPLITS:
        if (output_dir / split).exists():
            os.rename(output_dir / split, old / split)
        if (store / "merged" / split).exists():
            os.rename(store / "merged" / split, output_dir / split)
    for folder in (old, store / "merged"):
        shutil.rmtree(folder, ignore_errors=True)
