"""Settings of prepare_data.py, one class per command."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.config.datasets import DATA_HELP, DatasetConfig
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class PhantomConfig:
    """Settings of prepare_data.py phantom."""

    output_dir: str = HfArg(default="data/phantom", help="Output folder.")
    subjects: int = HfArg(default=200, help="Number of subjects, half of them AD.")
    slices: int = HfArg(default=10, help="Number of slices per subject.")
    plane: str = HfArg(
        default="sagittal",
        help="Plane of the slices.",
        metadata={"choices": ["sagittal", "coronal", "axial"]},
    )
    contrast: str = HfArg(default="t1", help="Image contrast.", metadata={"choices": ["t1", "t2"]})
    image_size: int = HfArg(default=64, help="Side of the square slice, pixels.")
    covariate_effects: bool = HfArg(
        default=False,
        help="Let age widen the ventricles and thin the cortex, and sex scale the brain, with the areas "
        "without the disease and at equal age in metadata.csv.",
    )
    age_gap: float = HfArg(default=3.0, help="Years by which AD is older than NC on average.")
    seed: int = HfArg(default=0, help="Random seed; the cohort does not depend on the number of workers.")
    workers: int | None = HfArg(default=None, help="Number of processes. Default: one per core.")


@dataclass(frozen=True)
class CheckConfig(DatasetConfig):
    """Settings of prepare_data.py check."""

    data_dir: str = HfArg(default="data/phantom", help=DATA_HELP)
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    figures: str | None = HfArg(
        default=None, help="Output folder of the figures, or none. Default: check/ in the current folder."
    )

    def __post_init__(self):
        class_names(self.classes)


@dataclass(frozen=True)
class ForgetConfig(DatasetConfig):
    """Settings of prepare_data.py forget."""

    subject: str = HfArg(default="", help="Subject, or image ID of a scan; also as the first argument.")
    data_dir: str = HfArg(default="data/adni", help=DATA_HELP)
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    runs: list[str] = HfArg(default_factory=list, help="Folders that hold models, at any depth.")
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    latent_cache: list[str] = HfArg(
        default_factory=list, help="Folders of cached latents, beside the default one of train_ldm.py."
    )
    yes: bool = HfArg(default=False, help="Delete the caches that are listed.")


@dataclass(frozen=True)
class ScansConfig:
    """Settings of prepare_data.py scans."""

    input_dir: str = HfArg(
        default="ADNI", help="Folder of scans: an archive's tree, BIDS, or with paths in the study table."
    )
    table: str | None = HfArg(
        default=None, help="Study table, CSV or TSV. Default: participants.tsv of BIDS."
    )
    output_dir: str = HfArg(default="data/adni", help="Output folder.")
    columns: list[str] = HfArg(
        default_factory=list,
        help="Columns that are not found by name, such as group=DX_bl: path, image_id, subject, group, "
        "session, age, sex, modality.",
    )
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    plane: str = HfArg(
        default="sagittal",
        help="Plane of the slices.",
        metadata={"choices": ["sagittal", "coronal", "axial"]},
    )
    slices: int = HfArg(default=20, help="Number of slices per scan, about the centre of the brain.")
    spacing_mm: float = HfArg(default=2.0, help="Distance between slices, mm.")
    image_size: int = HfArg(default=256, help="Side of the square slice, pixels.")
    field_of_view_mm: float = HfArg(
        default=256.0, help="Side of the square slice, mm; black beyond the scan."
    )
    register: str = HfArg(
        default="none",
        help="Space of the slices: none for the scanner's, or mni after affine registration.",
        metadata={"choices": ["none", "mni"]},
    )
    brain_mask: str = HfArg(
        default="none", help="none, mni for the template's, or files beside the scans: '{name}_mask.nii.gz'."
    )
    percentiles: list[float] = HfArg(
        default_factory=lambda: [0.5, 99.5], help="Percentiles of the brain that become black and white."
    )
    bits: int = HfArg(default=8, help="Bits per pixel of the PNG.", metadata={"choices": [8, 16]})
    val_fraction: float = HfArg(default=0.15, help="Fraction of the subjects for validation.")
    test_fraction: float = HfArg(default=0.15, help="Fraction of the subjects for testing.")
    test_subjects: str | None = HfArg(
        default=None, help="File of the subjects of the test set, one per line, instead of a fraction."
    )
    workers: int | None = HfArg(default=None, help="Number of processes. Default: one per core.")

    def __post_init__(self):
        class_names(self.classes)
        for column in self.columns:
            if not all(column.partition("=")):
                raise UserError(f"--columns {column}: expected PURPOSE=NAME, such as group=DX_bl")
        if len(self.percentiles) != 2:
            raise UserError(f"--percentiles {self.percentiles}: give two, such as 0.5 99.5")
