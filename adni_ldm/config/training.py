"""Settings of the two training recipes, and which of them a resumed run must share with its first part."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from adni_ldm.config.classes import CLASSES_HELP, TABLE_HELP, class_names
from adni_ldm.config.parsing import setting
from adni_ldm.errors import UserError

EMA_HELP = (
    "Half-life of that average, images: what was learned so long ago has half the weight of what is learned "
    "now. At first it is 8 % of the images seen."
)


@dataclass(frozen=True)
class TrainingConfig:
    """What both training recipes ask."""

    data_dir: str = setting(
        "data/phantom",
        "Folder of slices, {train,val,test}/{AD,NC}/SUBJECT_SLICE.png, or an AD_NC folder or its zip.",
    )
    output_dir: str = setting("runs/model", "Folder that the model, its log and its pictures are written to.")
    classes: str = setting("AD,NC", CLASSES_HELP)
    table: str | None = setting(None, TABLE_HELP)
    image_size: int = setting(
        256, "Side of the square slice, pixels. Slices are padded with black, then resized."
    )
    val_fraction: float = setting(
        0.1,
        "Share of the training subjects held out for validation where the data has no val folder, 0 to 1.",
    )
    max_steps: int = setting(10_000, "Optimizer updates to train for.")
    batch_size: int = setting(16, "Slices a process takes at once.")
    gradient_accumulation_steps: int = setting(1, "Batches whose gradients are averaged into one update.")
    learning_rate: float = setting(1e-4, "Peak learning rate of AdamW.")
    warmup_steps: int = setting(500, "Updates of linear warm-up, before the cosine decay to zero.")
    weight_decay: float = setting(0.01, "AdamW's weight decay.")
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this L2 norm.")
    seed: int = setting(
        0, "Seed of weights, data order and noise. The same seed and settings repeat the run."
    )
    mixed_precision: str | None = setting(
        None,
        "Precision of the forward pass; weights stay float32. Default: what accelerate launch says, else "
        "bf16 where the hardware has it, else no.",
        ["no", "fp16", "bf16"],
    )
    channels_last: bool | None = setting(
        None,
        "Keep images and weights in channels-last order: faster in half precision on a GPU, half as fast on "
        "CPU. Default: on a GPU.",
    )
    gradient_checkpointing: bool = setting(
        False, "Compute activations again in the backward pass: less memory, about a third slower."
    )
    attention: str = setting(
        "sdpa", "Attention kernel: torch's own, or xformers' (CUDA).", ["sdpa", "xformers"]
    )
    compile: bool = setting(False, "Compile the networks with torch.compile: minutes to start, then faster.")
    optimizer: str = setting(
        "adamw",
        "AdamW, or bitsandbytes' with its moments in 8 bits: a quarter of their memory (CUDA).",
        ["adamw", "adamw8bit"],
    )
    offload_ema: bool = setting(False, "Keep the moving average of the weights in the host's memory.")
    deterministic: bool = setting(
        False,
        "Only kernels that give the same bits each time, slower: a resume on a GPU then repeats the "
        "uninterrupted run bit for bit, as it does on CPU without this.",
    )
    max_nonfinite: int = setting(
        20, "Updates in a row that may be skipped because loss or gradient is not finite; then the run ends."
    )
    init_from: str | None = setting(
        None,
        "Fine-tune: folder or Hub name of a model of the kind that this recipe writes; for train_vae.py any "
        "diffusers AutoencoderKL, of colour as well.",
    )
    resume_from_checkpoint: str | None = setting(
        None,
        "Go on from a checkpoint folder, or from the `latest` of --output_dir (none yet: a first start).",
    )
    checkpointing_steps: int = setting(1000, "Updates between checkpoints; 0 writes none.")
    checkpoints_total_limit: int = setting(2, "How many checkpoints stay on disk.")
    log_steps: int = setting(25, "Updates between the lines of metrics.csv.")
    report_to: str = setting("tensorboard", "Tracker of accelerate: tensorboard, wandb, …, or none.")
    num_workers: int | None = setting(
        None,
        "Processes that read slices ahead, per training process. Default: 2 beside a GPU; 0 on CPU, where "
        "they would take the cores that compute.",
    )

    def __post_init__(self):
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_steps", "image_size")
        for name in (*counts, "checkpoints_total_limit", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction} must lie between 0 and 1")
        class_names(self.classes)


@dataclass(frozen=True)
class TrainVAEConfig(TrainingConfig):
    """Settings of train_vae.py."""

    output_dir: str = setting("runs/vae", "Folder that the VAE, its log and its pictures are written to.")
    widths: list[int] = setting(
        [64, 128, 256, 256], "Channels per level, fine to coarse; each level but the first halves the side."
    )
    latent_channels: int = setting(4, "Channels of the latent.")
    layers_per_block: int = setting(1, "Residual blocks per level.")
    mid_attention: bool = setting(False, "Self-attention at the coarsest level.")
    reconstruction_loss: str = setting("l1", "Distance between slice and reconstruction.", ["l1", "l2"])
    kl_weight: float = setting(1e-4, "Weight of the KL term (mean over the latent's elements, nats).")
    spectral_weight: float = setting(
        0.0, "Weight of the spectral term: amplitudes of the slices' frequencies (arXiv:2005.00341)."
    )
    perceptual: str = setting(
        "none",
        "Features of the perceptual term: none, vgg (ImageNet), radimagenet, medicalnet, or a file or folder "
        "of their weights.",
    )
    perceptual_weight: float = setting(0.1, "Weight of the perceptual term.")
    discriminator_weight: float = setting(
        0.0,
        "Train against a patch discriminator, whose gradient weighs this share of the other terms' "
        "(VQGAN's adaptive weight, arXiv:2012.09841); 0: without.",
    )
    discriminator_start: int | None = setting(
        None, "Updates before the discriminator begins. Default: half of --max_steps."
    )
    discriminator_width: int = setting(64, "Channels of its first layer.")
    use_ema: bool = setting(False, "Save an exponential moving average of the weights.")
    ema_halflife_images: float = setting(11_000, EMA_HELP)
    eval_images: int = setting(256, "Held-out slices measured each epoch; the last measurement takes all.")

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

    output_dir: str = setting(
        "runs/ldm", "Folder that the pipeline, its log and its pictures are written to."
    )
    vae: str | None = setting(
        None,
        "Folder or Hub name of the VAE that train_vae.py wrote. Default: that of --init_from, else runs/vae.",
    )
    latent_cache: str | None = setting(
        None,
        "Folder that the slices' latents are kept in, for this run's resume and for others on the same VAE "
        "and slices. Default: adni_ldm/latents in the Hugging Face cache.",
    )
    latent_variants: int = setting(
        0,
        "Augmented variants of each slice beside it: turned by up to 5 degrees, shifted by up to 3 % of the "
        "side, brighter or darker by up to 10 %; never flipped. Each takes the disk that the slices take.",
    )
    unet_widths: list[int] = setting([128, 256, 384, 512], "Channels per level of the U-Net, fine to coarse.")
    layers_per_block: int = setting(2, "Residual blocks per level of the U-Net.")
    token_dim: int = setting(256, "Width of a class token.")
    prediction_type: str = setting(
        "v_prediction", "What the U-Net predicts: the noise, or the velocity.", ["epsilon", "v_prediction"]
    )
    num_train_timesteps: int = setting(1000, "Timesteps of the noise schedule.")
    rescale_betas_zero_snr: bool = setting(
        True, "Last timestep is pure noise (Lin et al. 2024, arXiv:2305.08891); asks for v_prediction."
    )
    snr_gamma: float = setting(
        5.0, "γ of min-SNR weighting (Hang et al. 2023, arXiv:2303.09556); 0 weighs all alike."
    )
    label_dropout: float = setting(0.1, "Share of labels replaced by the null class, for guidance; 0 to 1.")
    use_ema: bool = setting(True, "Sample from, and save, an exponential moving average of the weights.")
    ema_halflife_images: float = setting(110_000, EMA_HELP)
    freeze: list[str] = setting(
        [],
        "With --init_from: parts that stay as they are, by how the names of their weights begin: unet.down "
        "unet.mid class_embedding. The VAE always does.",
    )
    lora_rank: int = setting(
        0,
        "With --init_from: train matrices of this rank beside the U-Net's weights, and the class tokens; "
        "also saved alone, as pytorch_lora_weights.safetensors. 0 trains the weights themselves.",
    )
    validation_steps: int = setting(
        1000, "Updates between pictures of samples and held-out losses; 0 draws none."
    )
    evaluation_steps: int = setting(
        0,
        "Updates between small reports: KID against held-out slices, agreement with the class, share of "
        "copies. The pipeline with the lowest KID is kept in OUTPUT_DIR/best. 0 makes none.",
    )
    evaluate_images: int = setting(64, "Slices of each class drawn for such a report.")
    evaluate_slices: int = setting(
        5000, "Most training and most held-out slices that they are compared with."
    )
    classifier_steps: int = setting(
        200, "Batches of 64 slices that the classifier is trained on which judges them, at the start."
    )
    num_inference_steps: int = setting(50, "DDIM steps of those pictures.")
    guidance_scale: float = setting(1.5, "Guidance of those pictures; 1 is none.")
    push_to_hub: bool = setting(False, "Push the pipeline to --hub_model_id when training ends, as private.")
    hub_model_id: str | None = setting(None, "Repository of the Hub, ME/NAME; made where there is none.")
    accept_privacy_risk: bool = setting(
        False, "Push although no report has judged privacy yet: a memorized scan may leave with the model."
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


# Of the training settings, these may differ when a run is resumed: they say where things lie and how often to
# look, or a hash of the data and weights says it better.
_FREE = {"data_dir", "table", "val_fraction", "output_dir", "vae", "init_from", "resume_from_checkpoint"}
_FREE |= {"mixed_precision", "num_workers", "report_to", "log_steps", "checkpointing_steps"}
_FREE |= {
    "checkpoints_total_limit",
    "max_nonfinite",
    "eval_images",
    "validation_steps",
    "num_inference_steps",
}
_FREE |= {"evaluation_steps", "evaluate_images", "evaluate_slices", "classifier_steps", "guidance_scale"}
_FREE |= {"push_to_hub", "hub_model_id", "accept_privacy_risk"}
_FREE |= {"latent_cache", "perceptual"}
# These change the rounding and not the method: a resume says that they differ, and goes on.
_ROUNDING = {"channels_last", "gradient_checkpointing", "attention", "compile"}
_ROUNDING |= {"offload_ema", "deterministic"}


def settings_to_keep(config: TrainingConfig) -> dict[str, dict[str, object]]:
    """Settings that a resumed run "must" share with the one it goes on from, and those it "should"."""
    values = dataclasses.asdict(config)
    return {
        "must": {f"--{name}": values[name] for name in values.keys() - _FREE - _ROUNDING},
        "should": {f"--{name}": values[name] for name in values.keys() & _ROUNDING},
    }


def save_config(config, folder: str | Path) -> None:
    """Write the resolved settings as `training_config.json` beside the model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
