"""Settings of evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.config.parsing import setting
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of evaluate.py."""

    real: str = setting("data/phantom", "Folder of real slices, AD_NC folder, or its zip.")
    samples: str = setting("samples", "Folder of samples, one subfolder a class, as sample.py writes it.")
    output_dir: str = setting("report", "Folder that report.html, metrics.json and figures/ are written to.")
    model: str | None = setting(
        None,
        "Pipeline that drew the samples, for what needs it: agreement by guidance scale, the membership "
        "test, reconstructions and the U-Net's own view. Not loaded unless asked for.",
    )
    features: str = setting(
        "classifier",
        "What pictures are compared by: `classifier`, trained here on the real slices; `vae` of --model; "
        "`inception`; or a vision model of transformers by name or folder (DINOv2, RAD-DINO).",
    )
    classes: str = setting("AD,NC", CLASSES_HELP)
    table: str | None = setting(None, TABLE_HELP)
    val_fraction: float = setting(0.1, "As in training, where the data has no val folder.")
    pixel_mm: float | None = setting(
        None, "Side of a pixel, mm. Default: from the data's metadata.csv, else 256 mm over the slice's side."
    )
    max_slices: int = setting(
        5000,
        "Most real slices of a split that are compared, the same share of every subject's, and most samples "
        "of a class.",
    )
    classifier_steps: int = setting(
        200, "Batches of 64 slices that each of the report's three classifiers is trained on."
    )
    guidance_scales: list[float] = setting(
        [1.0, 1.5, 2.5, 4.0], "Guidance scales at which --model's agreement with the class is measured."
    )
    curve_images: int = setting(24, "Slices of each class that are drawn for each of them; 0 draws none.")
    curve_steps: int = setting(20, "Denoising steps of those.")
    seed: int = setting(0, "The same seed gives the same figures on the same machine.")

    def __post_init__(self):
        class_names(self.classes)
        if self.pixel_mm is not None and not self.pixel_mm > 0:
            raise UserError(f"--pixel_mm {self.pixel_mm} must be above 0")
        if self.max_slices < 1 or self.curve_images < 0 or self.curve_steps < 1:
            raise UserError("--max_slices and --curve_steps must be at least 1, --curve_images at least 0")
