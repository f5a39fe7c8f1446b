"""Prepare slices for training, and check them.

    python prepare_data.py phantom --output_dir data/phantom --subjects 200   # synthetic cohort from MNI152
    python prepare_data.py scans --input_dir ADNI --table study.csv --output_dir data/adni --register mni
    python prepare_data.py check ADNI/AD_NC --table study.csv                 # QC of a folder or zip
    python prepare_data.py forget 002_S_xxxx --data_dir data/adni --runs runs # where a withdrawn subject lies

Each command has its own --help.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from adni_ldm.config import (
    CheckConfig,
    ForgetConfig,
    PhantomConfig,
    ScansConfig,
    class_names,
    parse_config,
    run_command,
)
from adni_ldm.errors import UserError, run_recipe

if TYPE_CHECKING:
    from adni_ldm.data.qc import QCReport

SOME_REJECTED = 3  # exit status: done, but rejected.csv has a line or more


def phantom(arguments: list[str]) -> None:
    """Write a synthetic cohort: real anatomy, a known effect of disease, no download."""
    cfg = parse_config(PhantomConfig, phantom.__doc__, arguments, "prepare_data.py phantom")
    try:
        from adni_ldm.preprocessing.phantom import write_phantom_cohort

        table = write_phantom_cohort(**dataclasses.asdict(cfg))
    except ImportError as error:
        raise UserError(f"the phantom cohort needs {error.name}: pip install 'adni-ldm[scans]'") from error
    print(f"{len(table)} slices of {cfg.subjects} subjects in {cfg.output_dir}")


def scans(arguments: list[str]) -> int:
    """Extract slices from 3-D scans, NIfTI or DICOM, with labels from a study table.

    An interrupted run resumes. Exit status 3: done, but rejected.csv lists scans or rows of the table.
    """
    cfg = parse_config(ScansConfig, scans.__doc__, arguments, "prepare_data.py scans")
    try:
        from adni_ldm.preprocessing.conversion import convert_scans, decide_splits, earlier_splits
        from adni_ldm.preprocessing.scan_to_slices import mask_names
        from adni_ldm.preprocessing.slicing import SlicingSettings
        from adni_ldm.preprocessing.study import read_study

        if "mni" in (cfg.register, cfg.brain_mask):
            import nilearn  # noqa: F401
    except ImportError as error:
        raise UserError(f"reading scans needs {error.name}: pip install 'adni-ldm[scans]'") from error

    names = [field.name for field in dataclasses.fields(SlicingSettings)]
    given = {name: getattr(cfg, name) for name in names} | {"percentiles": tuple(cfg.percentiles)}
    slicing = SlicingSettings(**given)

    # Splits follow from the table alone, whichever scans can be read.
    classes, columns = class_names(cfg.classes), dict(column.split("=", 1) for column in cfg.columns)
    study = read_study(cfg.input_dir, cfg.table, classes, columns, ignore=mask_names(slicing))
    test_subjects = _read_list(cfg.test_subjects) if cfg.test_subjects else None
    earlier = earlier_splits(cfg.output_dir)
    splits = decide_splits(study.subjects, earlier, cfg.val_fraction, cfg.test_fraction, test_subjects)
    for note in study.notes:
        print(note)

    settings = {k: getattr(cfg, k) for k in ("classes", "val_fraction", "test_fraction", "test_subjects")}
    folder = convert_scans(study, splits, cfg.input_dir, cfg.output_dir, slicing, cfg.workers, settings)
    print(f"{len(folder.table)} slices of {folder.table.subject.nunique()} subjects in {cfg.output_dir}")
    if len(folder.rejected):
        rejected = Path(cfg.output_dir) / "rejected.csv"
        print(f"{len(folder.rejected)} scans or rows rejected: see {rejected} for the reasons")
        return SOME_REJECTED
    return 0


def _read_list(path: str) -> set[str]:
    if not Path(path).is_file():
        raise UserError(f"--test_subjects {path}: no such file")
    return {line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()}


def check(arguments: list[str]) -> int:
    """Report what a folder of slices holds, and whether it can be trained on; exit status 1 if not.

    Saves contact sheets and histograms to check/ of the current folder, or to --figures.
    """
    from adni_ldm.data.hub_datasets import as_folder
    from adni_ldm.data.qc import check_folder

    cfg = parse_config(CheckConfig, check.__doc__, arguments, "prepare_data.py check", positional="data_dir")
    names = class_names(cfg.classes)
    folder = as_folder(cfg.data_dir, names, **cfg.dataset_options)
    report = check_folder(folder, class_names=names, table=cfg.table)
    print(report)
    save_figures(report, cfg.figures)
    return 0 if report.ok else 1


def save_figures(report: QCReport, figures: str | None) -> None:
    """Save the figures of a report to `figures`; None: to check/, unless that would be inside the data."""
    from adni_ldm.data.qc_figures import save_qc_figures

    folder = Path(figures or "check")
    if figures is None and folder.resolve().is_relative_to(report.folder.resolve()):
        print("figures: none, since check/ would be inside the data; give --figures DIR")
    elif figures != "none":
        try:
            paths = save_qc_figures(report, folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); give --figures DIR") from error
        print(f"figures: {', '.join(map(str, paths)) or 'none, without images'}")


def forget(arguments: list[str]) -> None:
    """List where the images of a withdrawn subject lie, and delete the caches that hold them with --yes.

    Lists images and tables of the data, caches, and the models that were trained on the subject, which must
    be retrained. Delete the data yourself, first. Scans, samples, figures of runs, reports and backups are
    not searched.
    """
    from huggingface_hub.constants import HF_HOME

    from adni_ldm.data.hub_datasets import as_folder
    from adni_ldm.data.withdrawal import find_traces

    cfg = parse_config(
        ForgetConfig, forget.__doc__, arguments, "prepare_data.py forget", positional="subject"
    )
    if not cfg.subject:
        raise UserError("give the subject: python prepare_data.py forget SUBJECT --data_dir DIR")
    latents = [Path(HF_HOME, "adni_ldm", "latents"), *cfg.latent_cache]
    folder = as_folder(cfg.data_dir, class_names(cfg.classes), **cfg.dataset_options)
    traces = find_traces(cfg.subject, cfg.data_dir, cfg.runs, cfg.table, latents, folder)
    for trace in traces:
        print(f"{trace.kind:<6} {trace.path}: {trace.what}")
    caches = [trace.path for trace in traces if trace.kind == "cache"]
    if cfg.yes:
        for path in caches:
            shutil.rmtree(path)
    done = "deleted" if cfg.yes else "to be deleted with --yes"
    counts = {kind: sum(trace.kind == kind for trace in traces) for kind in ("data", "model")}
    print(
        f"{counts['data']} files of the data, to be deleted by yourself; {len(caches)} caches, {done}; "
        f"{counts['model']} models"
    )
    if not cfg.runs:
        print("models were not searched: give --runs DIR")


COMMANDS = {"phantom": phantom, "scans": scans, "check": check, "forget": forget}

if __name__ == "__main__":
    run_recipe(lambda: run_command(__doc__, COMMANDS))
