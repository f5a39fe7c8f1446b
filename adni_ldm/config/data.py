"""Settings of prepare_data.py, a class for each of its commands."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class PhantomConfig:
    """Settings of prepare_data.py phantom."""

    output_dir: str = HfArg(default="data/phantom", help="Folder that the cohort is written to.")
    subjects: int = HfArg(default=200, help="Subjects, half of them AD.")
    slices: int = HfArg(default=10, help="Slices per subject.")
    plane: str = HfArg(
        default="sagittal", help="Direction of the slices.", metadata={"choices": ["sagittal", "coronal"]}
    )
    contrast: str = HfArg(
        default="t1", help="t1, or t2: fluid bright, white matter dark.", metadata={"choices": ["t1", "t2"]}
    )
    image_size: int = HfArg(default=64, help="Side of the square slice, pixels.")
    seed: int = HfArg(default=0, help="The same seed makes the same cohort, whatever the number of workers.")
    workers: int | None = HfArg(default=None, help="Processes. Default: one a core.")


@dataclass(frozen=True)
class CheckConfig:
    """Settings of prepare_data.py check."""

    data_dir: str = HfArg(default="data/phantom", help="Folder of slices, AD_NC folder, or its zip.")
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    figures: str | None = HfArg(
        default=None,
        help="Folder that the pictures are written to; `none` draws none. Default: check/ in the current "
        "folder.",
    )

    def __post_init__(self):
        class_names(self.classes)


@dataclass(frozen=True)
class ScansConfig:
    """Settings of prepare_data.py scans."""

    input_dir: str = HfArg(
        default="ADNI", help="Folder of scans: an archive's tree, BIDS, or any other with paths."
    )
    table: str | None = HfArg(
        default=None,
        help="Study table, .csv or .tsv: who is who. Default: participants.tsv of a BIDS folder.",
    )
    output_dir: str = HfArg(default="data/adni", help="Folder that the slices are written to.")
    columns: list[str] = HfArg(
        default_factory=list,
        help="Names of the table's columns where they are not found: subject=PTID group=DX_bl; of path, "
        "image_id, subject, group, session, age, sex, modality.",
    )
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    plane: str = HfArg(
        default="sagittal",
        help="Direction of the slices.",
        metadata={"choices": ["sagittal", "coronal", "axial"]},
    )
    slices: int = HfArg(default=20, help="Slices of each scan, about the middle of the brain.")
    spacing_mm: float = HfArg(default=2.0, help="From slice to slice, mm.")
    image_size: int = HfArg(default=256, help="Side of the square slice, pixels.")
    field_of_view_mm: float = HfArg(
        default=256.0, help="Side of the square slice, mm; what the scan lacks is black."
    )
    register: str = HfArg(
        default="none",
        help="Space of the slices: none, the scanner's, or mni, after affine registration.",
        metadata={"choices": ["none", "mni"]},
    )
    brain_mask: str = HfArg(
        default="none",
        help="What is black around the brain: mni, by the template's mask; none; or files beside the scans, "
        "such as '{name}_mask.nii.gz'.",
    )
    percentiles: list[float] = HfArg(
        default_factory=lambda: [0.5, 99.5], help="Of the brain's intensity: what becomes black, and white."
    )
    bits: int = HfArg(default=8, help="Bits of a grey value in the PNG.", metadata={"choices": [8, 16]})
    val_fraction: float = HfArg(default=0.15, help="Share of the subjects for validation.")
    test_fraction: float = HfArg(default=0.15, help="Share of the subjects for the test.")
    test_subjects: str | None = HfArg(
        default=None, help="File with a subject a line: exactly these are the test set, in place of a share."
    )
    shard: str | None = HfArg(
        default=None,
        help="I/N: only this part of the scans; run all N, on one output_dir, then prepare_data.py merge.",
    )
    workers: int | None = HfArg(default=None, help="Processes. Default: one a core.")

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

    output_dir: str = HfArg(
        default="data/adni", help="Folder that all shards of prepare_data.py scans wrote to."
    )
