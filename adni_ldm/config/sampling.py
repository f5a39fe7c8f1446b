"""Settings of sample.py and app.py."""

from __future__ import annotations

from dataclasses import dataclass

from adni_ldm.config.parsing import setting
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sample.py."""

    class_labels: str = setting(
        "all", "Class to draw: AD, NC, 0, 1, a comma list, or all.", aliases=["--class"]
    )
    model: str = setting("runs/ldm", "Folder or Hub name of the pipeline that train_ldm.py wrote.")
    output_dir: str = setting("samples", "Folder that the slices are written to, one subfolder a class.")
    num_images: int = setting(16, "Slices of each class.")
    num_inference_steps: int = setting(50, "Denoising steps.")
    guidance_scale: float = setting(
        1.5, "Strength of the class; 1 is no guidance. More exaggerates what sets the class apart."
    )
    guidance_interval: list[float] = setting(
        [0.0, 1.0],
        "LOW HIGH: part of the noise schedule that is guided, 0 the clean image and 1 pure noise. The rest "
        "costs half, and diversity lasts longer without guidance at high noise.",
    )
    eta: float = setting(0.0, "Stochasticity of DDIM: 0 is deterministic, 1 is as random as DDPM.")
    scheduler: str = setting(
        "ddim", "Sampler.", ["ddim", "ddpm", "dpm++", "dpm++_sde", "euler", "heun", "unipc"]
    )
    seed: int = setting(0, "Slice k of seed s is the same whatever the batch size, up to rounding.")
    batch_size: int = setting(16, "Slices that a process draws at once.")
    mixed_precision: str | None = setting(
        None,
        "Precision of the U-Net; the VAE decodes in float32. Default: bf16 where the hardware has it.",
        ["no", "fp16", "bf16"],
    )
    trajectory: bool = setting(
        False, "Also draw trajectory.png: one brain of each class coming out of the noise."
    )
    from_image: str | None = setting(
        None, "Draw this slice, a picture file, as it would look in the class --to, and nothing else."
    )
    morph: int = setting(
        0, "Draw one brain going from class --from to --to in so many frames, PNG and GIF, and nothing else."
    )
    source: str | None = setting(
        None,
        "Class that the slice has, or the morph begins with. Default: as the slice's metadata.csv says.",
        aliases=["--from"],
    )
    target: str | None = setting(None, "Class that the slice gets, or the morph ends with.", aliases=["--to"])
    strength: float = setting(
        0.8,
        "Share of the noise schedule that --from_image goes back, 0 to 1. More lets the class change more, "
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


@dataclass(frozen=True)
class AppConfig:
    """Settings of app.py."""

    model: str = setting("runs/ldm", "Folder or Hub name of the pipeline that train_ldm.py wrote.")
    report: str | None = setting(
        None,
        "Folder of evaluate.py's report on the model. Default: report/ in the model's folder or beside it.",
    )
    host: str | None = setting(
        None,
        "Address to listen at; 0.0.0.0 is all of this machine's. Default: this machine alone can see it.",
    )
    port: int = setting(7860, "Port to listen at; 0 takes a free one.")
    max_images: int = setting(16, "Most slices that one visitor draws at once.")
    max_steps: int = setting(100, "Most denoising steps.")
    queue_size: int = setting(20, "Visitors who may wait; the next one is told that it is full.")
    max_upload_mb: int = setting(10, "Largest file that is taken, MB.")
    push_space: str | None = setting(
        None, "Make a Space of this page on the Hub, ME/NAME, of a model that is on the Hub, and end."
    )
    public: bool = setting(False, "Everybody may see that Space; else it is private.")

    def __post_init__(self):
        for name in ("max_images", "queue_size", "max_upload_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.max_steps < 2 or not 0 <= self.port < 65536:
            raise UserError(f"--max_steps {self.max_steps} must be at least 2, --port {self.port} 0 to 65535")
