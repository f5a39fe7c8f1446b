"""Settings of prepare_data.py, a class for each of its commands."""

from __future__ import annotations

from dataclasses import dataclass

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.config.parsing import setting
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class PhantomConfig:
    """Settings of prepare_data.py phantom."""

    output_dir: str = setting("data/phantom", "Folder that the cohort is written to.")
    subjects: int = setting(200, "Subjects, half of them AD.")
    slices: int = setting(10, "Slices per subject.")
    plane: str = setting("sagittal", "Direction of the slices.", ["sagittal", "coronal"])
    contrast: str = setting("t1", "t1, or t2: fluid bright, white matter dark.", ["t1", "t2"])
    image_size: int = setting(64, "Side of the square slice, pixels.")
    seed: int = setting(0, "The same seed makes the same cohort, whatever the number of workers.")
    workers: int | None = setting(None, "Processes. Default: one a core.")


@dataclass(frozen=True)
class CheckConfig:
    """Settings of prepare_data.py check."""

    data_dir: str = setting("data/phantom", "Folder of slices, AD_NC folder, or its zip.")
    classes: str = setting("AD,NC", CLASSES_HELP)
    table: str | None = setting(None, TABLE_HELP)
    figures: str | None = setting(
        None,
        "Folder that the pictures are written to; `none` draws none. Default: check/ in the current folder.",
    )

    def __post_init__(self):
        class_names(self.classes)


@dataclass(frozen=True)
class ScansConfig:
    """Settings of prepare_data.py scans."""

    input_dir: str = setting("ADNI", "Folder of scans: an archive's tree, BIDS, or any other with paths.")
    table: str | None = setting(
        None, "Study table, .csv or .tsv: who is who. Default: participants.tsv of a BIDS folder."
    )
    output_dir: str = setting("data/adni", "Folder that the slices are written to.")
    columns: list[str] = setting(
        [],
        "Names of the table's columns where they are not found: subject=PTID group=DX_bl; of path, "
        "image_id, subject, group, session, age, sex, modality.",
    )
    classes: str = setting("AD,NC", CLASSES_HELP)
    plane: str = setting("sagittal", "Direction of the slices.", ["sagittal", "coronal", "axial"])
    slices: int = setting(20, "Slices of each scan, about the middle of the brain.")
    spacing_mm: float = setting(2.0, "From slice to slice, mm.")
    image_size: int = setting(256, "Side of the square slice, pixels.")
    field_of_view_mm: float = setting(256.0, "Side of the square slice, mm; what the scan lacks is black.")
    register: str = setting(
        "none",
        "Space of the slices: none, the scanner's, or mni, after affine registration.",
        ["none", "mni"],
    )
    brain_mask: str = setting(
        "none",
        "What is black around the brain: mni, by the template's mask; none; or files beside the scans, "
        "such as '{name}_mask.nii.gz'.",
    )
    percentiles: list[float] = setting(
        [0.5, 99.5], "Of the brain's intensity: what becomes black, and white."
    )
    bits: int = setting(8, "Bits of a grey value in the PNG.", [8, 16])
    val_fraction: float = setting(0.15, "Share of the subjects for validation.")
    test_fraction: float = setting(0.15, "Share of the subjects for the test.")
    test_subjects: str | None = setting(
        None, "File with a subject a line: exactly these are the test set, in place of a share."
    )
    shard: str | None = setting(
        None, "I/N: only this part of the scans; run all N, on one output_dir, then prepare_data.py merge."
    )
    workers: int | None = setting(None, "Processes. Default: one a core.")

    def __post_init__(self):
        class_names(self.classes)
        for column in self.columns:
            if not all(column.partition("=")):
                raise UserError(f"--columns {column}: expected PURPOSE=NAME, such as group=DX_bl")
        if len(self.percentiles) != 2:
            raise UserError(f"--percentiles {self.percentiles}: give two, such as 0.5 99.5")


@dataclass(frozen=True)
class MergeConfig:
    """Settings of prepare_data.py merge."""

    output_dir: str = setting("data/adni", "Folder that all shards of prepare_data.py scans wrote to.")
