"""Settings of evaluate.py."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.config.datasets import DATA_HELP, DatasetConfig
from adni_ldm.config.parsing import check_at_least
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig(DatasetConfig):
    """Settings of evaluate.py."""

    real: str = HfArg(default="data/phantom", help=f"Real slices. {DATA_HELP}")
    samples: str = HfArg(default="samples", help="Folder of samples, one subfolder per class.")
    output_dir: str = HfArg(default="report", help="Output folder: report.html, metrics.json, figures/.")
    model: str | None = HfArg(
        default=None,
        help="Pipeline that generated the samples. Adds class-conditioning accuracy by guidance scale, "
        "membership inference, reconstructions and U-Net bottleneck features.",
    )
    also_trained_on: list[str] = HfArg(
        default_factory=list,
        help="Folders or zips of the other data that the model or its autoencoder was trained on before: "
        "copies are searched for in their training slices too. Privacy cannot be judged without all of them.",
    )
    features: str = HfArg(
        default="classifier",
        help="Features in which slices are compared: `classifier`, trained here on the real slices; `vae` of "
        "--model; `inception`; or a vision model of transformers by name or folder (DINOv2, RAD-DINO).",
    )
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    val_fraction: float = HfArg(default=0.1, help="As in training, if the data have no val folder.")
    pixel_mm: float | None = HfArg(
        default=None, help="Side of a pixel, mm. Default: that of metadata.csv, else 256 mm over the side."
    )
    max_slices: int = HfArg(
        default=5000, help="Most real slices of a split, evenly of its subjects, and most samples of a class."
    )
    classifier_steps: int = HfArg(
        default=200, help="Training steps of each of the report's three classifiers, in batches of 64 slices."
    )
    guidance_scales: list[float] = HfArg(
        default_factory=lambda: [1.0, 1.5, 2.5, 4.0],
        help="Guidance scales at which the class-conditioning accuracy of --model is measured.",
    )
    curve_images: int = HfArg(default=24, help="Samples of each class at each of these scales; 0 for none.")
    curve_steps: int | None = HfArg(
        default=None, help="Number of denoising steps of these samples. Default: the model's own."
    )
    require: list[str] = HfArg(
        default_factory=list,
        help="Exit with status 4 unless the verdicts on these questions are favourable, separated by commas: "
        "fidelity, usefulness, faithfulness, privacy.",
    )
    seed: int = HfArg(default=0, help="The same seed gives the same metrics on the same machine.")

    def __post_init__(self):
        class_names(self.classes)
        names = [name for one in self.require for name in one.split(",")]
        object.__setattr__(self, "require", names)
        if self.pixel_mm is not None and not self.pixel_mm > 0:
            raise UserError(f"--pixel_mm {self.pixel_mm} must be above 0")
        check_at_least(1, self, "max_slices", "curve_steps")
        check_at_least(0, self, "curve_images")
