"""Make slices to train on, and look at what is there.

    python prepare_data.py phantom --output_dir data/phantom --subjects 200   # a cohort made of MNI152
    python prepare_data.py scans --input_dir ADNI --table study.csv --output_dir data/adni --register mni
    python prepare_data.py merge --output_dir data/adni                       # after scans --shard 1/8 ...
    python prepare_data.py check ADNI/AD_NC --table study.csv                 # what is in a folder or zip

Each command has its own --help.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from adni_ldm.config import (
    CheckConfig,
    MergeConfig,
    PhantomConfig,
    ScansConfig,
    class_names,
    parse_config,
    run_command,
)
from adni_ldm.errors import UserError, run_recipe

if TYPE_CHECKING:
    from adni_ldm.data.qc import CheckReport


def make_phantom(arguments: list[str]) -> None:
    """Write a synthetic cohort: real anatomy, known disease, no download."""
    cfg = parse_config(PhantomConfig, make_phantom.__doc__, arguments, prog="prepare_data.py phantom")
    try:
        from adni_ldm.preprocessing.phantom import write_phantom_cohort

        table = write_phantom_cohort(
            cfg.output_dir,
            cfg.subjects,
            cfg.slices,
            cfg.image_size,
            cfg.seed,
            cfg.workers,
            cfg.plane,
            cfg.contrast,
        )
    except ImportError as error:
        raise UserError(f"the phantom cohort needs {error.name}: pip install 'adni-ldm[scans]'") from error
    except FileExistsError as error:
        raise UserError(str(error)) from error
    print(f"{len(table)} slices of {cfg.subjects} subjects in {cfg.output_dir}")


SOME_REJECTED = 3  # exit status: all is done, but rejected.csv has a line or more


def scans(arguments: list[str]) -> int:
    """Cut slices out of 3-D scans, NIfTI or DICOM, with labels from a study table.

    Stopped, it goes on where it was. Exit status 3: done, but some scans or rows are in rejected.csv.
    """
    cfg = parse_config(ScansConfig, scans.__doc__, arguments, prog="prepare_data.py scans")
    try:
        from adni_ldm.preprocessing.conversion import (
            convert_scans,
            decide_splits,
            earlier_splits,
            parse_shard,
        )
        from adni_ldm.preprocessing.scan_to_slices import Method, mask_names
        from adni_ldm.preprocessing.study import read_study

        if "mni" in (cfg.register, cfg.brain_mask):
            import nilearn  # noqa: F401
            import SimpleITK  # noqa: F401
    except ImportError as error:
        raise UserError(f"reading scans needs {error.name}: pip install 'adni-ldm[scans]'") from error

    # How a scan becomes pictures.
    names = [field.name for field in dataclasses.fields(Method)]
    given = {name: getattr(cfg, name) for name in names} | {"percentiles": tuple(cfg.percentiles)}
    method = Method(**given)
    shard = parse_shard(cfg.shard) if cfg.shard else (1, 1)

    # Who there is, and on which side: out of the table alone, so that all shards agree.
    classes, columns = class_names(cfg.classes), dict(column.split("=", 1) for column in cfg.columns)
    study = read_study(cfg.input_dir, cfg.table, classes, columns, ignore=mask_names(method))
    listed = _read_list(cfg.test_subjects) if cfg.test_subjects else None
    earlier = earlier_splits(cfg.output_dir)
    splits = decide_splits(study.people, earlier, cfg.val_fraction, cfg.test_fraction, listed)
    for note in study.notes:
        print(note)

    recorded = {k: getattr(cfg, k) for k in ("classes", "val_fraction", "test_fraction", "test_subjects")}
    convert_scans(study, splits, cfg.input_dir, cfg.output_dir, method, cfg.workers, shard, recorded)
    if cfg.shard:
        print(
            f"shard {cfg.shard} is done; after the last: prepare_data.py merge --output_dir {cfg.output_dir}"
        )
        return 0
    return merge(["--output_dir", cfg.output_dir])


def _read_list(path: str) -> set[str]:
    if not Path(path).is_file():
        raise UserError(f"--test_subjects {path}: no such file")
    return {line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()}


def merge(arguments: list[str]) -> int:
    """Make one data folder of what all shards of `scans` wrote. Exit status 3: some are in rejected.csv."""
    cfg = parse_config(MergeConfig, merge.__doc__, arguments, prog="prepare_data.py merge")
    from adni_ldm.preprocessing.assembly import merge_scans

    merged = merge_scans(cfg.output_dir)
    table = merged.table
    print(f"{len(table)} slices of {table.subject.nunique()} subjects in {cfg.output_dir}")
    if len(merged.rejected):
        print(
            f"{len(merged.rejected)} scans or rows rejected: {Path(cfg.output_dir) / 'rejected.csv'} says why"
        )
    return SOME_REJECTED if len(merged.rejected) else 0


def check(arguments: list[str]) -> int:
    """Say what is in a folder of slices, and whether it can be trained on; exit status 1 if not.

    Draws a contact sheet of each class and histograms into check/ of the current folder, or into --figures.
    """
    from adni_ldm.data.qc import check_folder

    cfg = parse_config(CheckConfig, check.__doc__, arguments, "prepare_data.py check", positional="data_dir")
    report = check_folder(cfg.data_dir, class_names=class_names(cfg.classes), table=cfg.table)
    print(report)
    draw(report, cfg.figures)
    return 0 if report.ok else 1


def draw(report: CheckReport, figures: str | None) -> None:
    """Pictures of a report, into check/ of the current folder if not told; never into the data unasked."""
    from adni_ldm.data.qc_figures import draw_check

    folder = Path(figures or "check")
    if figures is None and folder.resolve().is_relative_to(report.folder.resolve()):
        print("pictures: none, for check/ would lie inside the data; give --figures DIR")
    elif figures != "none":
        try:
            drawn = draw_check(report, folder)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written to ({error.strerror}); give --figures DIR"
            ) from error
        print(f"pictures: {', '.join(map(str, drawn)) or 'none, without images'}")


COMMANDS = {"phantom": make_phantom, "scans": scans, "merge": merge, "check": check}

if __name__ == "__main__":
    run_recipe(lambda: run_command(__doc__, COMMANDS))
