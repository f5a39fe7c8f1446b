"""Settings of evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of evaluate.py."""

    real: str = HfArg(default="data/phantom", help="Folder of real slices, AD_NC folder, or its zip.")
    samples: str = HfArg(
        default="samples", help="Folder of samples, one subfolder a class, as sample.py writes it."
    )
    output_dir: str = HfArg(
        default="report", help="Folder that report.html, metrics.json and figures/ are written to."
    )
    model: str | None = HfArg(
        default=None,
        help="Pipeline that drew the samples, for what needs it: agreement by guidance scale, the membership "
        "test, reconstructions and the U-Net's own view. Not loaded unless asked for.",
    )
    features: str = HfArg(
        default="classifier",
        help="What pictures are compared by: `classifier`, trained here on the real slices; `vae` of "
        "--model; "
        "`inception`; or a vision model of transformers by name or folder (DINOv2, RAD-DINO).",
    )
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    val_fraction: float = HfArg(default=0.1, help="As in training, where the data has no val folder.")
    pixel_mm: float | None = HfArg(
        default=None,
        help="Side of a pixel, mm. Default: from the data's metadata.csv, else 256 mm over the slice's side.",
    )
    max_slices: int = HfArg(
        default=5000,
        help="Most real slices of a split that are compared, the same share of every subject's, and most "
        "samples "
        "of a class.",
    )
    classifier_steps: int = HfArg(
        default=200, help="Batches of 64 slices that each of the report's three classifiers is trained on."
    )
    guidance_scales: list[float] = HfArg(
        default_factory=lambda: [1.0, 1.5, 2.5, 4.0],
        help="Guidance scales at which --model's agreement with the class is measured.",
    )
    curve_images: int = HfArg(
        default=24, help="Slices of each class that are drawn for each of them; 0 draws none."
    )
    curve_steps: int = HfArg(default=20, help="Denoising steps of those.")
    seed: int = HfArg(default=0, help="The same seed gives the same figures on the same machine.")

    def __post_init__(self):
        class_names(self.classes)
        if self.pixel_mm is not None and not self.pixel_mm > 0:
            raise UserError(f"--pixel_mm {self.pixel_mm} must be above 0")
        if self.max_slices < 1 or self.curve_images < 0 or self.curve_steps < 1:
            raise UserError("--max_slices and --curve_steps must be at least 1, --curve_images at least 0")
