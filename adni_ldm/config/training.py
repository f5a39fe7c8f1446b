"""Settings of the training recipes, and which of them a resumed run must share with its first part."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar, get_type_hints

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.config.datasets import DATA_HELP, DatasetConfig, MayChange
from adni_ldm.config.parsing import check_at_least, check_sampling
from adni_ldm.errors import UserError
from adni_ldm.files import write_json

T = TypeVar("T")
# Beside `MayChange`, what changes the rounding and not the method: a resume warns of it, and continues.
RoundingOnly = Annotated[T, "should"]
NO_EPSILON = (
    "--prediction_type epsilon cannot be learned at zero terminal SNR, where the last timestep is pure "
    "noise: add --rescale_betas_zero_snr false, or --prediction_type v_prediction"
)
EMA_HELP = "Half-life of an update's weight in the EMA, images; early in training 8 %% of the images seen."


@dataclass(frozen=True)
class TrainingConfig(DatasetConfig):
    """Settings that both training recipes share."""

    data_dir: MayChange[str] = HfArg(default="data/phantom", help=DATA_HELP)
    output_dir: MayChange[str] = HfArg(
        default="runs/model", help="Folder for the model, its metrics and figures."
    )
    classes: str = HfArg(default="AD,NC", help=CLASSES_HELP)
    table: MayChange[str | None] = HfArg(default=None, help=TABLE_HELP)
    image_size: int = HfArg(
        default=256, help="Side of the square slice, pixels. Slices are padded with black, then resized."
    )
    val_fraction: MayChange[float] = HfArg(
        default=0.1,
        help="Fraction of the training subjects for validation, between 0 and 1, if there is no val folder.",
    )
    max_steps: int = HfArg(default=10_000, help="Number of optimizer updates.")
    batch_size: int = HfArg(default=16, help="Slices per process and batch.")
    gradient_accumulation_steps: int = HfArg(default=1, help="Batches averaged into one update.")
    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate of AdamW.")
    warmup_steps: int = HfArg(default=500, help="Updates of linear warm-up, before the cosine decay to zero.")
    weight_decay: float = HfArg(default=0.01, help="AdamW's weight decay.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are clipped to this L2 norm.")
    seed: int = HfArg(default=0, help="Seed of weights, data order and noise; it repeats the run.")
    mixed_precision: MayChange[str | None] = HfArg(
        default=None,
        help="Precision of the forward pass. Default: accelerate launch's, else bf16 if supported, else no.",
        metadata={"choices": ["no", "fp16", "bf16"]},
    )
    channels_last: RoundingOnly[bool | None] = HfArg(
        default=None, help="Channels-last memory format; half as fast on a CPU. Default: on a GPU."
    )
    gradient_checkpointing: RoundingOnly[bool] = HfArg(
        default=False, help="Recompute activations in the backward pass: less memory, a third slower."
    )
    attention: RoundingOnly[str] = HfArg(
        default="sdpa",
        help="Attention kernel: torch's scaled dot product, or xformers (CUDA).",
        metadata={"choices": ["sdpa", "xformers"]},
    )
    compile: RoundingOnly[bool] = HfArg(
        default=False, help="Compile the networks with torch.compile: minutes to start, then faster."
    )
    optimizer: str = HfArg(
        default="adamw",
        help="AdamW; bitsandbytes' AdamW with 8-bit moments, a quarter of their memory (CUDA); or Muon for "
        "matrices and kernels with AdamW for the rest, which learns more in a step (no FSDP, no DeepSpeed).",
        metadata={"choices": ["adamw", "adamw8bit", "muon"]},
    )
    offload_ema: RoundingOnly[bool] = HfArg(default=False, help="Keep the EMA of the weights in host memory.")
    deterministic: RoundingOnly[bool] = HfArg(
        default=False, help="Slower deterministic kernels: a resume on a GPU is bit-identical, as on a CPU."
    )
    max_nonfinite: MayChange[int] = HfArg(
        default=20, help="Skipped updates in a row, of non-finite loss or gradient, that end the run."
    )
    init_from: MayChange[str | None] = HfArg(
        default=None,
        help="Fine-tune this recipe's model or Stable Diffusion, by folder, Hub name or checkpoint "
        "(.safetensors); for train_vae.py any AutoencoderKL.",
    )
    revision: MayChange[str | None] = HfArg(
        default=None, help="Branch, tag or commit of --init_from on the Hub."
    )
    variant: MayChange[str | None] = HfArg(
        default=None, help="Variant of the weights of --init_from, such as fp16; they are trained in float32."
    )
    resume_from_checkpoint: MayChange[str | None] = HfArg(
        default=None, help="Checkpoint folder to resume from; `latest` of --output_dir, if there is one."
    )
    checkpointing_steps: MayChange[int] = HfArg(
        default=1000, help="Updates between checkpoints; 0 disables them."
    )
    checkpoints_total_limit: MayChange[int] = HfArg(default=2, help="Number of checkpoints to keep.")
    log_steps: MayChange[int] = HfArg(default=25, help="Updates between rows of metrics.csv.")
    report_to: MayChange[str] = HfArg(
        default="tensorboard", help="Tracker of accelerate: tensorboard, wandb, …, or none."
    )
    allow_remote_tracker: MayChange[bool] = HfArg(
        default=False,
        help="Allow a tracker other than tensorboard: metrics and what it collects itself may leave.",
    )
    num_workers: MayChange[int | None] = HfArg(
        default=None, help="Data-loading processes per training process. Default: 2 with a GPU, 0 on a CPU."
    )

    def __post_init__(self):
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_steps", "image_size")
        check_at_least(1, self, *counts, "checkpoints_total_limit", "max_nonfinite")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction} must be between 0 and 1")
        if self.report_to not in ("tensorboard", "none") and not self.allow_remote_tracker:
            raise UserError(
                f"--report_to {self.report_to} may send to a server: the metrics and, collected by the "
                "tracker, the command line with its paths, console output, host name and git state (no "
                "images, no weights). Add --allow_remote_tracker if your data permit it, or use tensorboard, "
                "which stays in --output_dir"
            )
        class_names(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""
        return class_names(self.classes)


@dataclass(frozen=True)
class TrainVAEConfig(TrainingConfig):
    """Settings of train_vae.py."""

    output_dir: MayChange[str] = HfArg(
        default="runs/vae", help="Folder for the VAE, its metrics and figures."
    )
    widths: list[int] = HfArg(
        default_factory=lambda: [64, 128, 256, 256],
        help="Channels per level, fine to coarse; each level but the first halves the side.",
    )
    patch_size: int = HfArg(
        default=1,
        help="Side of the patches of pixels that enter the network as channels; 2 is faster and as sharp, "
        "with one width less.",
    )
    latent_channels: int = HfArg(default=4, help="Channels of the latent.")
    layers_per_block: int = HfArg(default=1, help="Residual blocks per level.")
    mid_attention: bool = HfArg(default=False, help="Self-attention at the coarsest level.")
    reconstruction_loss: str = HfArg(
        default="l1", help="Pixel-wise reconstruction loss.", metadata={"choices": ["l1", "l2"]}
    )
    kl_weight: float = HfArg(default=1e-4, help="Weight of the KL divergence, nats per latent element.")
    spectral_weight: float = HfArg(
        default=0.0, help="Weight of the loss on amplitudes of spatial frequencies (arXiv:2005.00341)."
    )
    perceptual: MayChange[str] = HfArg(
        default="none",
        help="Perceptual loss: none, vgg (ImageNet), radimagenet, or a file or folder of weights.",
    )
    perceptual_weight: float = HfArg(default=0.1, help="Weight of the perceptual loss.")
    discriminator_weight: float = HfArg(
        default=0.0,
        help="Gradient of the PatchGAN adversarial loss as a fraction of that of the reconstruction loss "
        "(VQGAN's adaptive weight, arXiv:2012.09841); 0 disables it.",
    )
    discriminator_start: int | None = HfArg(
        default=None, help="Updates before the adversarial loss starts. Default: half of --max_steps."
    )
    discriminator_width: int = HfArg(default=64, help="Channels of the discriminator's first layer.")
    decoder_only: bool = HfArg(
        default=False,
        help="With --init_from: train the decoder and leave the encoder, and so all latents, as they are: an "
        "LDM trained on them samples with the new decoder. --kl_weight has no effect.",
    )
    use_ema: bool = HfArg(default=False, help="Save the exponential moving average (EMA) of the weights.")
    ema_halflife_images: float = HfArg(default=11_000, help=EMA_HELP)
    eval_images: MayChange[int] = HfArg(
        default=256, help="Held-out slices evaluated each epoch; the last evaluation uses all."
    )

    def __post_init__(self):
        super().__post_init__()
        weights = ("kl_weight", "spectral_weight", "perceptual_weight", "discriminator_weight")
        check_at_least(0, self, *weights)
        if self.decoder_only and not self.init_from:
            raise UserError(
                "--decoder_only: an encoder with random weights is of no use frozen; add --init_from"
            )
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
        default="runs/ldm", help="Folder for the pipeline, its metrics and figures."
    )
    vae: MayChange[str | None] = HfArg(
        default=None, help="Folder or Hub name of the VAE. Default: that of --init_from, else runs/vae."
    )
    latent_cache: MayChange[str | None] = HfArg(
        default=None,
        help="Folder of cached latents, which other runs on the same VAE and slices share. Default: "
        "adni_ldm/latents in the Hugging Face cache.",
    )
    measure_latents: bool = HfArg(
        default=False,
        help="Normalize the latents by their mean and SD over the training slices, in place of the scale "
        "that the VAE's config has: for a U-Net from scratch on a VAE from elsewhere.",
    )
    latent_variants: int = HfArg(
        default=0,
        help="Augmented variants cached with each slice: rotated by up to 5 degrees, shifted by up to "
        "3 %% of the side, intensity scaled by up to 10 %%; never flipped.",
    )
    unet_widths: list[int] = HfArg(
        default_factory=lambda: [128, 256, 384, 512], help="Channels per level of the U-Net, fine to coarse."
    )
    layers_per_block: int = HfArg(default=2, help="Residual blocks per level of the U-Net.")
    attention_levels: int | None = HfArg(
        default=None,
        help="Number of levels of the U-Net, from the coarsest, with attention beside that of its middle. "
        "Default: all but the finest.",
    )
    token_dim: int = HfArg(default=256, help="Width of a class token.")
    tokens_per_class: int = HfArg(
        default=2, help="Class tokens of each class. A pipeline of this recipe in --init_from keeps its own."
    )
    class_prompts: list[str] = HfArg(
        default_factory=list,
        help="With Stable Diffusion in --init_from: prompts, such as AD='a brain with atrophy', whose text "
        "embeddings the class tokens start at. Default: 'an MRI scan of the brain of a healthy control' and "
        "the like, which are printed. The null class has the empty prompt.",
    )
    prediction_type: str | None = HfArg(
        default=None,
        help="What the U-Net predicts: the noise or the velocity. Default: as in --init_from, else "
        "v_prediction. Another one than that of --init_from costs thousands of updates.",
        metadata={"choices": ["epsilon", "v_prediction"]},
    )
    num_train_timesteps: int = HfArg(default=1000, help="Timesteps of the noise schedule.")
    rescale_betas_zero_snr: bool | None = HfArg(
        default=None,
        help="Zero terminal SNR: the last timestep is pure noise (Lin et al. 2024, arXiv:2305.08891); "
        "requires v_prediction. Default: as in --init_from, else true.",
    )
    linear_calibration: MayChange[bool] = HfArg(
        default=True,
        help="Combine the trained U-Net with the Wiener filter of the latents, by principal component and "
        "timestep: samples vary more. Fitted in closed form, of 64 subjects or more; not with --lora_rank, "
        "whose file has no place for it.",
    )
    stable_targets: bool = HfArg(
        default=True,
        help="Train towards the mean of all training slices that a noisy latent may be of, in place of the "
        "one that it is of (stable target field, arXiv:2302.00670): the same optimum, sooner. Of slices "
        "whose --conditions are given, the one.",
    )
    snr_gamma: float = HfArg(
        default=5.0, help="γ of min-SNR loss weighting (Hang et al. 2023, arXiv:2303.09556); 0 disables it."
    )
    label_dropout: float = HfArg(
        default=0.1, help="Fraction of labels replaced by the null class, for classifier-free guidance."
    )
    conditions: list[str] = HfArg(
        default_factory=list,
        help="Columns of metadata.csv or of --table that the U-Net reads beside the class: age sex slice_mm. "
        "Samples can then be asked for by them, and the effect of the class is that at equal values.",
    )
    condition_dropout: float = HfArg(
        default=0.1,
        help="Fraction of the values of each condition that are hidden, so that any subset can be asked for; "
        "where the label is dropped, all are.",
    )
    use_ema: bool = HfArg(
        default=True, help="Sample from, and save, the exponential moving average (EMA) of the weights."
    )
    ema_halflife_images: float = HfArg(default=110_000, help=EMA_HELP)
    freeze: list[str] = HfArg(
        default_factory=list,
        help="With --init_from: weights that are not trained, by glob patterns of their names, such as "
        "'unet.down*' 'class_embedding.*'; after ! those that are, such as 'unet.*' '!*.attn2.to_[kv].*' for "
        "keys and values of cross-attention alone. The VAE is never trained.",
    )
    half_frozen: RoundingOnly[bool] = HfArg(
        default=False,
        help="With --freeze or --lora_rank: keep the U-Net's frozen weights in the half precision of "
        "--mixed_precision, which halves their memory; the saved pipeline is float32.",
    )
    lora_rank: int = HfArg(
        default=0,
        help="With --init_from: train LoRA of this rank on the U-Net, and the class tokens, and save "
        "pytorch_lora_weights.safetensors as well. 0 trains the weights themselves.",
    )
    validation_steps: MayChange[int] = HfArg(
        default=1000, help="Updates between validations (held-out loss, image of samples); 0 disables them."
    )
    evaluation_steps: MayChange[int] = HfArg(
        default=0,
        help="Updates between online evaluations: KID, class-conditioning accuracy, fraction of copies; 0 "
        "disables them. The pipeline with the lowest KID is kept in OUTPUT_DIR/best.",
    )
    evaluate_images: MayChange[int] = HfArg(default=64, help="Samples of each class per online evaluation.")
    evaluate_slices: MayChange[int] = HfArg(
        default=5000, help="Most training slices, and held-out slices, that samples are compared with."
    )
    classifier_steps: MayChange[int] = HfArg(
        default=200, help="Training steps, of 64 slices each, of online evaluation's classifier."
    )
    num_inference_steps: MayChange[int | None] = HfArg(
        default=None,
        help="DDIM steps of these samples, saved in the pipeline as its own. Default, of the next two as "
        "well: those of --init_from, else those of the pipeline's class (docs/sampling.md).",
    )
    guidance_scale: MayChange[float | None] = HfArg(
        default=None, help="Their classifier-free guidance scale, saved in the pipeline; 1 is no guidance."
    )
    eta: MayChange[float | None] = HfArg(
        default=None, help="Their stochasticity, saved in the pipeline; 0 is deterministic, 1 ancestral."
    )
    push_to_hub: MayChange[bool] = HfArg(
        default=False, help="Push the pipeline to --hub_model_id when training ends, as a private repository."
    )
    hub_model_id: MayChange[str | None] = HfArg(
        default=None, help="Hub repository, ME/NAME; created if it does not exist."
    )
    accept_privacy_risk: MayChange[bool] = HfArg(
        default=False, help="Push although privacy is not evaluated: a memorized scan may be published."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push_to_hub: give --hub_model_id ME/NAME")
        if self.push_to_hub and not self.accept_privacy_risk:
            raise UserError(
                "--push_to_hub: memorization of training scans has not been evaluated. Evaluate the model, "
                "then push it with python -m adni_ldm.hub push, or add --accept_privacy_risk"
            )
        if not self.init_from:
            for name, value in (("prediction_type", "v_prediction"), ("rescale_betas_zero_snr", True)):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(NO_EPSILON)
        if self.class_prompts and not self.init_from:
            raise UserError("--class_prompts: there is no text encoder without --init_from")
        for prompt in self.class_prompts:
            name, _, text = prompt.partition("=")
            if name not in self.class_names or not text:
                known = ", ".join(self.class_names)
                raise UserError(f"--class_prompts {prompt!r}: expected CLASS=PROMPT, of the classes {known}")
        prompted = [prompt.partition("=")[0] for prompt in self.class_prompts]
        if twice := {name for name in prompted if prompted.count(name) > 1}:
            raise UserError(f"--class_prompts: {', '.join(sorted(twice))} has two prompts; give one a class")
        check_at_least(0, self, "lora_rank", "latent_variants")
        check_at_least(1, self, "tokens_per_class")
        check_sampling(self)
        for name in ("label_dropout", "condition_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be in [0, 1)")

    @property
    def sampling(self) -> tuple[int | None, float | None, float | None]:
        """Number of steps, guidance scale and η that the model is sampled with; None: its own."""
        return self.num_inference_steps, self.guidance_scale, self.eta

    @property
    def online_evaluation(self) -> dict[str, int]:
        """Sizes and seed of the online evaluation."""
        sizes = {"max_slices": self.evaluate_slices, "count": self.evaluate_images, "seed": self.seed}
        return sizes | {"classifier_steps": self.classifier_steps}

    @property
    def base_options(self) -> dict:
        """How the pipeline of --init_from is loaded."""
        names = ("vae", "tokens_per_class", "revision", "variant")
        options = {name: getattr(self, name) for name in names}
        prompts = dict(prompt.split("=", 1) for prompt in self.class_prompts)
        return options | {"class_names": self.class_names, "class_prompts": prompts}


def settings_to_keep(config: TrainingConfig) -> dict[str, dict[str, object]]:
    """Settings that a resumed run "must" share with its first part, and those that it "should"."""
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
    write_json(folder / "training_config.json", dataclasses.asdict(config))
