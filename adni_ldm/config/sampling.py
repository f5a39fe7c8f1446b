"""Settings of sample.py."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.parsing import check_at_least, check_sampling
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sample.py."""

    class_labels: str = HfArg(
        default="all", help="Class to sample: AD, NC, 0, 1, a comma list, or all.", aliases=["--class"]
    )
    model: str = HfArg(default="runs/ldm", help="Folder or Hub name of a pipeline of train_ldm.py.")
    output_dir: str = HfArg(default="samples", help="Output folder, with one subfolder per class.")
    num_images: int = HfArg(default=16, help="Number of slices per class.")
    num_inference_steps: int | None = HfArg(
        default=None, help="Denoising steps. Default: the model's own, saved by train_ldm.py."
    )
    guidance_scale: float | None = HfArg(
        default=None,
        help="Scale of classifier-free guidance; 1 disables it. Higher scales exaggerate class differences. "
        "Default: the model's own.",
    )
    guidance_interval: list[float] = HfArg(
        default_factory=lambda: [0.0, 1.0],
        help="LOW HIGH: guidance interval as fractions of the noise schedule, 0 the clean image and 1 pure "
        "noise. Steps outside it take half the time. Without effect at guidance scale 1.",
    )
    eta: float | None = HfArg(
        default=None,
        help="Stochasticity of DDIM: 0 is deterministic, 1 is that of DDPM (ancestral sampling); the other "
        "schedulers ignore it. Default: the model's own; 0 for --from_image and --morph.",
    )
    decoder_noise: bool | None = HfArg(
        default=None,
        help="Sample the decoder: add the noise and finest texture of real slices, which no latent holds. "
        "false decodes the mean. Default: the model's own (true).",
    )
    scheduler: str = HfArg(
        default="ddim",
        help="Scheduler of the sampling steps.",
        metadata={"choices": ["ddim", "ddpm", "dpm++", "dpm++_sde", "euler", "heun", "unipc"]},
    )
    seed: int = HfArg(default=0, help="Random seed; slice k depends on the batch size up to rounding only.")
    batch_size: int = HfArg(default=16, help="Slices per batch and process.")
    mixed_precision: str | None = HfArg(
        default=None,
        help="Precision of the U-Net; the VAE decodes in float32. Default: bf16 where the hardware has it.",
        metadata={"choices": ["no", "fp16", "bf16"]},
    )
    conditions: list[str] = HfArg(
        default_factory=list,
        help="Of a model with conditions: age=75 sex=F, or a CSV file with a column for each condition and a "
        "row for each image. What is not given is as in the training data.",
    )
    match: str | None = HfArg(
        default=None,
        help="Data folder: ask for the conditions of its slices, in each class those of its own, so that "
        "samples have the covariates of real slices.",
    )
    match_split: str = HfArg(
        default="test", help="Split of --match.", metadata={"choices": ["train", "val", "test"]}
    )
    table: str | None = HfArg(default=None, help="Study table of --match, as of train_ldm.py.")
    sweep: str | None = HfArg(
        default=None,
        help="One brain of each class at several values of a condition, from the same noise at every step: "
        "NAME=LOW:HIGH:COUNT, such as age=55:90:8, or categories, such as sex=F,M. The other conditions are "
        "those of --conditions; --num_images is not used. Also saves sweep.png and sweep.gif.",
    )
    extrapolate: bool = HfArg(
        default=False,
        help="Allow conditions outside of their range in training; metadata.csv marks such samples.",
    )
    guide_conditions: bool = HfArg(
        default=False, help="Let guidance strengthen the conditions as well as the class."
    )
    trajectory: bool = HfArg(
        default=False, help="Also save trajectory.png: the denoising trajectory of one slice of each class."
    )
    from_image: str | None = HfArg(
        default=None,
        help="Image file of a slice: write its counterfactual --to another class or age, not samples.",
    )
    morph: int = HfArg(
        default=0, help="Number of frames of a class interpolation from --from to --to, instead of samples."
    )
    source: str | None = HfArg(
        default=None,
        help="Class of the slice (default: in its metadata.csv), or the interpolation's first class.",
        aliases=["--from"],
    )
    target: str | None = HfArg(
        default=None,
        help="Class of the counterfactual, or the condition that it changes, such as age=85; --conditions "
        "has those of the slice. The interpolation's last class.",
        aliases=["--to"],
    )
    strength: float = HfArg(
        default=0.8,
        help="Fraction of the noise schedule that --from_image inverts, 0 to 1. A higher strength lets the "
        "class change more and preserves less of the subject.",
    )

    def __post_init__(self):
        check_at_least(1, self, "num_images", "batch_size")
        check_sampling(self)
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            values = " ".join(map(str, interval))
            raise UserError(f"--guidance_interval {values}: give LOW HIGH within 0 and 1, such as 0.2 0.8")
        if self.from_image and self.morph:
            raise UserError(f"--from_image {self.from_image} and --morph {self.morph}: give only one of them")
        if self.morph and self.morph < 2:
            raise UserError(f"--morph {self.morph} must be at least 2 frames")
        if self.conditions and self.match:
            raise UserError(f"--conditions and --match {self.match}: give only one of them")
        if self.sweep and (self.match or self.from_image or self.morph):
            other = "match" if self.match else "from_image" if self.from_image else "morph"
            raise UserError(f"--sweep {self.sweep} and --{other}: give only one of them")
        if self.match and (self.from_image or self.morph):
            raise UserError(f"--match {self.match} is for samples: give --conditions of the slice")
        if not 0 <= self.strength <= 1:
            raise UserError(f"--strength {self.strength} must lie in [0, 1]")
        if (self.from_image or self.morph) and not self.target:
            raise UserError("--to is missing: the target class, such as --to AD")
        if self.morph and not self.source:
            raise UserError("--from is missing: the first class, such as --from NC")
        if (self.from_image or self.morph) and (self.scheduler != "ddim" or self.eta):
            raise UserError("--from_image and --morph use DDIM: they take --scheduler ddim and --eta 0 only")
