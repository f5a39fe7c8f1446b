"""Settings of sample.py."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sample.py."""

    class_labels: str = HfArg(
        default="all", help="Class to draw: AD, NC, 0, 1, a comma list, or all.", aliases=["--class"]
    )
    model: str = HfArg(default="runs/ldm", help="Folder or Hub name of the pipeline that train_ldm.py wrote.")
    output_dir: str = HfArg(
        default="samples", help="Folder that the slices are written to, one subfolder a class."
    )
    num_images: int = HfArg(default=16, help="Slices of each class.")
    num_inference_steps: int = HfArg(default=50, help="Denoising steps.")
    guidance_scale: float = HfArg(
        default=1.5,
        help="Strength of the class; 1 is no guidance. More exaggerates what sets the class apart.",
    )
    guidance_interval: list[float] = HfArg(
        default_factory=lambda: [0.0, 1.0],
        help="LOW HIGH: part of the noise schedule that is guided, 0 the clean image and 1 pure noise. The "
        "rest "
        "costs half, and diversity lasts longer without guidance at high noise.",
    )
    eta: float = HfArg(default=0.0, help="Stochasticity of DDIM: 0 is deterministic, 1 is as random as DDPM.")
    scheduler: str = HfArg(
        default="ddim",
        help="Sampler.",
        metadata={"choices": ["ddim", "ddpm", "dpm++", "dpm++_sde", "euler", "heun", "unipc"]},
    )
    seed: int = HfArg(
        default=0, help="Slice k of seed s is the same whatever the batch size, up to rounding."
    )
    batch_size: int = HfArg(default=16, help="Slices that a process draws at once.")
    mixed_precision: str | None = HfArg(
        default=None,
        help="Precision of the U-Net; the VAE decodes in float32. Default: bf16 where the hardware has it.",
        metadata={"choices": ["no", "fp16", "bf16"]},
    )
    trajectory: bool = HfArg(
        default=False, help="Also draw trajectory.png: one brain of each class coming out of the noise."
    )
    from_image: str | None = HfArg(
        default=None,
        help="Draw this slice, a picture file, as it would look in the class --to, and nothing else.",
    )
    morph: int = HfArg(
        default=0,
        help="Draw one brain going from class --from to --to in so many frames, PNG and GIF, and nothing "
        "else.",
    )
    source: str | None = HfArg(
        default=None,
        help="Class that the slice has, or the morph begins with. Default: as the slice's metadata.csv says.",
        aliases=["--from"],
    )
    target: str | None = HfArg(
        default=None, help="Class that the slice gets, or the morph ends with.", aliases=["--to"]
    )
    strength: float = HfArg(
        default=0.8,
        help="Share of the noise schedule that --from_image goes back, 0 to 1. More lets the class change "
        "more, "
        "and keeps less of the person.",
    )

    def __post_init__(self):
        for name in ("num_images", "num_inference_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            told = " ".join(map(str, interval))
            raise UserError(f"--guidance_interval {told}: give LOW HIGH within 0 and 1, such as 0.2 0.8")
        if self.from_image and self.morph:
            raise UserError(f"--from_image {self.from_image} and --morph {self.morph}: give one of them")
        if self.morph and self.morph < 2:
            raise UserError(f"--morph {self.morph} must be at least 2 frames")
        if not 0 <= self.strength <= 1:
            raise UserError(f"--strength {self.strength} must lie in [0, 1]")
        if (self.from_image or self.morph) and not self.target:
            raise UserError("--to is missing: the class to end with, such as --to AD")
        if self.morph and not self.source:
            raise UserError("--from is missing: the class to begin with, such as --from NC")
        if (self.from_image or self.morph) and (self.scheduler != "ddim" or self.eta):
            raise UserError("--from_image and --morph take --scheduler ddim and --eta 0 only")
