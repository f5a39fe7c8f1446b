"""Settings of the two training recipes, and which of them a resumed run must share with its first part."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.errors import UserError

# A resumed run must repeat every setting of its first part, but for these: where files are and how often to
# report, or what a hash of data and weights identifies better ...
T = TypeVar("T")
MayChange = Annotated[T, "free"]
# ... and what changes the rounding and not the method: a resume warns that they differ, and continues.
RoundingOnly = Annotated[T, "should"]
EMA_HELP = (
    "Half-life of that average, images: what was learned so long ago has half the weight of what is learned "
    "now. At first it is 8 %% of the images seen."
)


@dataclass(frozen=True)
class TrainingConfig:
    """What both training recipes ask."""

    data_dir: MayChange[str] = HfArg(
        default="data/phantom",
        help="Folder of slices, {train,val,test}/{AD,NC}/SUBJECT_SLICE.png, or an AD_NC folder or its zip.",
    )
    output_dir: MayChange[str] = HfArg(
        default="runs/model", help="Folder that the model, its log and its pictures are written to."
    )
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    table: MayChange[str | None] = HfArg(default=None, help=TABLE_HELP)
    image_size: int = HfArg(
        default=256, help="Side of the square slice, pixels. Slices are padded with black, then resized."
    )
    val_fraction: MayChange[float] = HfArg(
        default=0.1,
        help="Share of the training subjects held out for validation where the data has no val folder, 0 "
        "to 1.",
    )
    max_steps: int = HfArg(default=10_000, help="Optimizer updates to train for.")
    batch_size: int = HfArg(default=16, help="Slices a process takes at once.")
    gradient_accumulation_steps: int = HfArg(
        default=1, help="Batches whose gradients are averaged into one update."
    )
    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate of AdamW.")
    warmup_steps: int = HfArg(default=500, help="Updates of linear warm-up, before the cosine decay to zero.")
    weight_decay: float = HfArg(default=0.01, help="AdamW's weight decay.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this L2 norm.")
    seed: int = HfArg(
        default=0, help="Seed of weights, data order and noise. The same seed and settings repeat the run."
    )
    mixed_precision: MayChange[str | None] = HfArg(
        default=None,
        help="Precision of the forward pass; weights stay float32. Default: what accelerate launch says, "
        "else "
        "bf16 where the hardware has it, else no.",
        metadata={"choices": ["no", "fp16", "bf16"]},
    )
    channels_last: RoundingOnly[bool | None] = HfArg(
        default=None,
        help="Keep images and weights in channels-last order: faster in half precision on a GPU, half as "
        "fast on "
        "CPU. Default: on a GPU.",
    )
    gradient_checkpointing: RoundingOnly[bool] = HfArg(
        default=False,
        help="Compute activations again in the backward pass: less memory, about a third slower.",
    )
    attention: RoundingOnly[str] = HfArg(
        default="sdpa",
        help="Attention kernel: torch's own, or xformers' (CUDA).",
        metadata={"choices": ["sdpa", "xformers"]},
    )
    compile: RoundingOnly[bool] = HfArg(
        default=False, help="Compile the networks with torch.compile: minutes to start, then faster."
    )
    optimizer: str = HfArg(
        default="adamw",
        help="AdamW, or bitsandbytes' with its moments in 8 bits: a quarter of their memory (CUDA).",
        metadata={"choices": ["adamw", "adamw8bit"]},
    )
    offload_ema: RoundingOnly[bool] = HfArg(
        default=False, help="Keep the moving average of the weights in the host's memory."
    )
    deterministic: RoundingOnly[bool] = HfArg(
        default=False,
        help="Only kernels that give the same bits each time, slower: a resume on a GPU then repeats the "
        "uninterrupted run bit for bit, as it does on CPU without this.",
    )
    max_nonfinite: MayChange[int] = HfArg(
        default=20,
        help="Updates in a row that may be skipped because loss or gradient is not finite; then the run "
        "ends.",
    )
    init_from: MayChange[str | None] = HfArg(
        default=None,
        help="Fine-tune: folder or Hub name of a model of the kind that this recipe writes; for "
        "train_vae.py any "
        "diffusers AutoencoderKL, of colour as well.",
    )
    resume_from_checkpoint: MayChange[str | None] = HfArg(
        default=None,
        help="Go on from a checkpoint folder, or from the `latest` of --output_dir (none yet: a first "
        "start).",
    )
    checkpointing_steps: MayChange[int] = HfArg(
        default=1000, help="Updates between checkpoints; 0 writes none."
    )
    checkpoints_total_limit: MayChange[int] = HfArg(default=2, help="How many checkpoints stay on disk.")
    log_steps: MayChange[int] = HfArg(default=25, help="Updates between the lines of metrics.csv.")
    report_to: MayChange[str] = HfArg(
        default="tensorboard", help="Tracker of accelerate: tensorboard, wandb, …, or none."
    )
    num_workers: MayChange[int | None] = HfArg(
        default=None,
        help="Processes that read slices ahead, per training process. Default: 2 beside a GPU; 0 on CPU, "
        "where "
        "they would take the cores that compute.",
    )

    def __post_init__(self):
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_steps", "image_size")
        for name in (*counts, "checkpoints_total_limit", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction} must be between 0 and 1")
        class_names(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""
        return class_names(self.classes)


@dataclass(frozen=True)
class TrainVAEConfig(TrainingConfig):
    """Settings of train_vae.py."""

    output_dir: MayChange[str] = HfArg(
        default="runs/vae", help="Folder that the VAE, its log and its pictures are written to."
    )
    widths: list[int] = HfArg(
        default_factory=lambda: [64, 128, 256, 256],
        help="Channels per level, fine to coarse; each level but the first halves the side.",
    )
    latent_channels: int = HfArg(default=4, help="Channels of the latent.")
    layers_per_block: int = HfArg(default=1, help="Residual blocks per level.")
    mid_attention: bool = HfArg(default=False, help="Self-attention at the coarsest level.")
    reconstruction_loss: str = HfArg(
        default="l1", help="Distance between slice and reconstruction.", metadata={"choices": ["l1", "l2"]}
    )
    kl_weight: float = HfArg(
        default=1e-4, help="Weight of the KL term (mean over the latent's elements, nats)."
    )
    spectral_weight: float = HfArg(
        default=0.0,
        help="Weight of the spectral term: amplitudes of the slices' frequencies (arXiv:2005.00341).",
    )
    perceptual: MayChange[str] = HfArg(
        default="none",
        help="Features of the perceptual term: none, vgg (ImageNet), radimagenet, or a file or "
        "folder "
        "of their weights.",
    )
    perceptual_weight: float = HfArg(default=0.1, help="Weight of the perceptual term.")
    discriminator_weight: float = HfArg(
        default=0.0,
        help="Train against a patch discriminator, whose gradient weighs this share of the other terms' "
        "(VQGAN's adaptive weight, arXiv:2012.09841); 0: without.",
    )
    discriminator_start: int | None = HfArg(
        default=None, help="Updates before the discriminator begins. Default: half of --max_steps."
    )
    discriminator_width: int = HfArg(default=64, help="Channels of its first layer.")
    use_ema: bool = HfArg(default=False, help="Save an exponential moving average of the weights.")
    ema_halflife_images: float = HfArg(default=11_000, help=EMA_HELP)
    eval_images: MayChange[int] = HfArg(
        default=256, help="Held-out slices measured each epoch; the last measurement takes all."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("kl_weight", "spectral_weight", "perceptual_weight", "discriminator_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 0")
        if self.discriminator_weight and self.image_size < 32:
            raise UserError(
                f"--image_size {self.image_size}: a discriminator needs slices of 32 pixels or more"
            )
        if self.discriminator_width < 4 or self.discriminator_width % 4:
            raise UserError(f"--discriminator_width {self.discriminator_width} must be a multiple of 4")


@dataclass(frozen=True)
class TrainLDMConfig(TrainingConfig):
    """Settings of train_ldm.py."""

    output_dir: MayChange[str] = HfArg(
        default="runs/ldm", help="Folder that the pipeline, its log and its pictures are written to."
    )
    vae: MayChange[str | None] = HfArg(
        default=None,
        help="Folder or Hub name of the VAE that train_vae.py wrote. Default: that of --init_from, else "
        "runs/vae.",
    )
    latent_cache: MayChange[str | None] = HfArg(
        default=None,
        help="Folder that the slices' latents are kept in, for this run's resume and for others on the "
        "same VAE "
        "and slices. Default: adni_ldm/latents in the Hugging Face cache.",
    )
    latent_variants: int = HfArg(
        default=0,
        help="Augmented variants of each slice beside it: turned by up to 5 degrees, shifted by up to 3 %% "
        "of the "
        "side, brighter or darker by up to 10 %%; never flipped. Each takes the disk that the slices take.",
    )
    unet_widths: list[int] = HfArg(
        default_factory=lambda: [128, 256, 384, 512], help="Channels per level of the U-Net, fine to coarse."
    )
    layers_per_block: int = HfArg(default=2, help="Residual blocks per level of the U-Net.")
    token_dim: int = HfArg(default=256, help="Width of a class token.")
    prediction_type: str = HfArg(
        default="v_prediction",
        help="What the U-Net predicts: the noise, or the velocity.",
        metadata={"choices": ["epsilon", "v_prediction"]},
    )
    num_train_timesteps: int = HfArg(default=1000, help="Timesteps of the noise schedule.")
    rescale_betas_zero_snr: bool = HfArg(
        default=True,
        help="Last timestep is pure noise (Lin et al. 2024, arXiv:2305.08891); asks for v_prediction.",
    )
    snr_gamma: float = HfArg(
        default=5.0, help="γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); 0 weighs all alike."
    )
    label_dropout: float = HfArg(
        default=0.1, help="Share of labels replaced by the null class, for guidance; 0 to 1."
    )
    use_ema: bool = HfArg(
        default=True, help="Sample from, and save, an exponential moving average of the weights."
    )
    ema_halflife_images: float = HfArg(default=110_000, help=EMA_HELP)
    freeze: list[str] = HfArg(
        default_factory=list,
        help="With --init_from: parts that stay as they are, by how the names of their weights begin: "
        "unet.down "
        "unet.mid class_embedding. The VAE always does.",
    )
    lora_rank: int = HfArg(
        default=0,
        help="With --init_from: train matrices of this rank beside the U-Net's weights, and the class "
        "tokens; "
        "also saved alone, as pytorch_lora_weights.safetensors. 0 trains the weights themselves.",
    )
    validation_steps: MayChange[int] = HfArg(
        default=1000, help="Updates between pictures of samples and held-out losses; 0 draws none."
    )
    evaluation_steps: MayChange[int] = HfArg(
        default=0,
        help="Updates between small reports: KID against held-out slices, agreement with the class, share of "
        "copies. The pipeline with the lowest KID is kept in OUTPUT_DIR/best. 0 makes none.",
    )
    evaluate_images: MayChange[int] = HfArg(default=64, help="Slices of each class drawn for such a report.")
    evaluate_slices: MayChange[int] = HfArg(
        default=5000, help="Most training and most held-out slices that they are compared with."
    )
    classifier_steps: MayChange[int] = HfArg(
        default=200,
        help="Batches of 64 slices that the classifier is trained on which judges them, at the start.",
    )
    num_inference_steps: MayChange[int] = HfArg(default=50, help="DDIM steps of those pictures.")
    guidance_scale: MayChange[float] = HfArg(default=1.5, help="Guidance of those pictures; 1 is none.")
    push_to_hub: MayChange[bool] = HfArg(
        default=False, help="Push the pipeline to --hub_model_id when training ends, as private."
    )
    hub_model_id: MayChange[str | None] = HfArg(
        default=None, help="Repository of the Hub, ME/NAME; made where there is none."
    )
    accept_privacy_risk: MayChange[bool] = HfArg(
        default=False,
        help="Push although no report has judged privacy yet: a memorized scan may leave with the model.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push_to_hub: give --hub_model_id ME/NAME")
        if self.push_to_hub and not self.accept_privacy_risk:
            raise UserError(
                "--push_to_hub: nothing has judged yet whether the model memorized scans. Evaluate it, then "
                "push with python -m adni_ldm.hub push, or add --accept_privacy_risk"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "--prediction_type epsilon cannot be learned where the last timestep is pure noise: "
                "add --rescale_betas_zero_snr false, or take v_prediction"
            )
        if self.lora_rank < 0:
            raise UserError(f"--lora_rank {self.lora_rank} must be at least 0")
        if self.latent_variants < 0:
            raise UserError(f"--latent_variants {self.latent_variants} must be at least 0")
        if not 0 <= self.label_dropout < 1:
            raise UserError(f"--label_dropout {self.label_dropout} must lie in [0, 1)")


def settings_to_keep(config: TrainingConfig) -> dict[str, dict[str, object]]:
    """Settings that a resumed run "must" share with the one it goes on from, and those it "should"."""
    hints = get_type_hints(type(config), include_extras=True)
    kept = {"must": {}, "should": {}, "free": {}}
    for field in dataclasses.fields(config):
        (rule,) = getattr(hints[field.name], "__metadata__", ("must",))
        kept[rule][f"--{field.name}"] = getattr(config, field.name)
    return {"must": kept["must"], "should": kept["should"]}


def save_config(config, folder: str | Path) -> None:
    """Write the resolved settings as `training_config.json` beside the model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
