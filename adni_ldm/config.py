"""Settings of the recipes: one frozen dataclass each.

Flags, YAML files and the `config.json` that a run leaves behind all come from these classes. A recipe
reads `--config FILE.yaml` first and lays its flags over it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from transformers import HfArgumentParser

from adni_ldm.errors import UserError

Config = TypeVar("Config")


def setting(default, help: str, choices: list | None = None, aliases: list | None = None):
    """A dataclass field with its help; a list as default is copied for each instance."""
    # argparse fills in what stands behind a percent sign
    metadata = {"help": help.replace("%", "%%"), "aliases": aliases or []}
    metadata |= {"choices": choices} if choices else {}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


CLASSES_HELP = "Classes by the names of their folders, in the order of their labels: AD,NC or AD,MCI,NC."
TABLE_HELP = "The archive's study table (CSV), for files named by image ID: the person in it is the subject."
EMA_HELP = (
    "Half-life of that average, images: what was learned so long ago has half the weight of what is learned "
    "now. At first it is 8 % of the images seen."
)


def class_names(classes: str) -> tuple[str, ...]:
    """("AD", "NC") of "AD,NC", and of "AD,CN", which is the archive's word for the same.

    Raises:
        UserError: fewer than two, or one twice.
    """
    names = tuple({"CN": "NC"}.get(name.strip(), name.strip()) for name in classes.split(","))
    if len(names) < 2 or not all(names) or len(set(names)) < len(names):
        raise UserError(f"--classes {classes}: give two or more different ones, such as AD,NC or AD,MCI,NC")
    return names


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
    keep_checkpoints: int = setting(2, "How many checkpoints stay on disk.")
    log_steps: int = setting(25, "Updates between the lines of metrics.csv.")
    report_to: str = setting("tensorboard", "Tracker of accelerate: tensorboard, wandb, …, or none.")
    num_workers: int | None = setting(
        None,
        "Processes that read slices ahead, per training process. Default: 2 beside a GPU; 0 on CPU, where "
        "they would take the cores that compute.",
    )

    def __post_init__(self):
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps", "log_steps", "image_size")
        for name in (*counts, "keep_checkpoints", "max_nonfinite"):
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
    vae: str = setting("runs/vae", "Folder or Hub name of the VAE that train_vae.py wrote.")
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
    sample_steps: int = setting(
        1000, "Updates between pictures of samples and held-out losses; 0 draws none."
    )
    evaluate_every: int = setting(
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


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sample.py."""

    class_labels: str = setting(
        "all", "Class to draw: AD, NC, 0, 1, a comma list, or all.", aliases=["--class"]
    )
    model: str = setting("runs/ldm", "Folder or Hub name of the pipeline that train_ldm.py wrote.")
    output_dir: str = setting("samples", "Folder that the slices are written to, one subfolder a class.")
    num_images: int = setting(16, "Slices of each class.")
    steps: int = setting(50, "Denoising steps.")
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
        for name in ("num_images", "steps", "batch_size"):
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


@dataclass(frozen=True)
class PhantomConfig:
    """Settings of prepare_data.py phantom."""

    output_dir: str = setting("data/phantom", "Folder that the cohort is written to.")
    subjects: int = setting(200, "Subjects, half of them AD.")
    slices: int = setting(10, "Slices per subject.")
    plane: str = setting("sagittal", "Direction of the slices.", ["sagittal", "coronal"])
    contrast: str = setting("t1", "t1, or t2: fluid bright, white matter dark.", ["t1", "t2"])
    image_size: int = setting(64, "Side of the square slice, pixels.")
    seed: int = setting(0, "The same seed makes the same cohort, whatever the number of workers.")
    workers: int | None = setting(None, "Processes. Default: one a core.")


@dataclass(frozen=True)
class CheckConfig:
    """Settings of prepare_data.py check."""

    data_dir: str = setting("data/phantom", "Folder of slices, AD_NC folder, or its zip.")
    classes: str = setting("AD,NC", CLASSES_HELP)
    table: str | None = setting(None, TABLE_HELP)
    figures: str | None = setting(
        None,
        "Folder that the pictures are written to; `none` draws none. Default: check/ in the current folder.",
    )

    def __post_init__(self):
        class_names(self.classes)


@dataclass(frozen=True)
class ScansConfig:
    """Settings of prepare_data.py scans."""

    input_dir: str = setting("ADNI", "Folder of scans: an archive's tree, BIDS, or any other with paths.")
    table: str | None = setting(
        None, "Study table, .csv or .tsv: who is who. Default: participants.tsv of a BIDS folder."
    )
    output_dir: str = setting("data/adni", "Folder that the slices are written to.")
    columns: list[str] = setting(
        [],
        "Names of the table's columns where they are not found: subject=PTID group=DX_bl; of path, "
        "image_id, subject, group, session, age, sex, modality.",
    )
    classes: str = setting("AD,NC", CLASSES_HELP)
    plane: str = setting("sagittal", "Direction of the slices.", ["sagittal", "coronal", "axial"])
    slices: int = setting(20, "Slices of each scan, about the middle of the brain.")
    spacing_mm: float = setting(2.0, "From slice to slice, mm.")
    image_size: int = setting(256, "Side of the square slice, pixels.")
    field_of_view_mm: float = setting(256.0, "Side of the square slice, mm; what the scan lacks is black.")
    register: str = setting(
        "none",
        "Space of the slices: none, the scanner's, or mni, after affine registration.",
        ["none", "mni"],
    )
    brain_mask: str = setting(
        "none",
        "What is black around the brain: mni, by the template's mask; none; or files beside the scans, "
        "such as '{name}_mask.nii.gz'.",
    )
    percentiles: list[float] = setting(
        [0.5, 99.5], "Of the brain's intensity: what becomes black, and white."
    )
    bits: int = setting(8, "Bits of a grey value in the PNG.", [8, 16])
    val_fraction: float = setting(0.15, "Share of the subjects for validation.")
    test_fraction: float = setting(0.15, "Share of the subjects for the test.")
    test_subjects: str | None = setting(
        None, "File with a subject a line: exactly these are the test set, in place of a share."
    )
    shard: str | None = setting(
        None, "I/N: only this part of the scans; run all N, on one output_dir, then prepare_data.py merge."
    )
    workers: int | None = setting(None, "Processes. Default: one a core.")

    def __post_init__(self):
        class_names(self.classes)
        for column in self.columns:
            if not all(column.partition("=")):
                raise UserError(f"--columns {column}: expected PURPOSE=NAME, such as group=DX_bl")
        if len(self.percentiles) != 2:
            raise UserError(f"--percentiles {self.percentiles}: give two, such as 0.5 99.5")


@dataclass(frozen=True)
class MergeConfig:
    """Settings of prepare_data.py merge."""

    output_dir: str = setting("data/adni", "Folder that all shards of prepare_data.py scans wrote to.")


@dataclass(frozen=True)
class ShareConfig:
    """What both commands of python -m adni_ldm.hub ask."""

    repo_id: str | None = setting(None, "Repository of the Hub, ME/NAME; made where there is none.")
    data_dir: list[str] = setting(
        [],
        "Folders of the data that the model was trained on, which what is pushed is compared with. Default: "
        "the one in its training_config.json.",
    )
    table: str | None = setting(None, TABLE_HELP)
    report: str | None = setting(
        None, "Folder of evaluate.py's report on the model. Default: report/ in the model's folder."
    )
    public: bool = setting(False, "Everybody may see it; else it is private.")
    accept_privacy_risk: bool = setting(
        False, "Push although the report's verdict on privacy is bad, or there is none."
    )
    overwrite: bool = setting(False, "Replace all that is in a repository that holds something else.")
    license: str | None = setting(
        None,
        "Licence of what is pushed, by the Hub's word for it. Default: apache-2.0 where the data are the "
        "phantom cohort; else `other`, the agreement of ADNI, which covers what is derived from its data.",
    )
    dry_run: str | None = setting(
        None, "Folder that what would be pushed is written to, after it was looked through; nothing leaves."
    )


@dataclass(frozen=True)
class PushConfig(ShareConfig):
    """Settings of python -m adni_ldm.hub push."""

    folder: str = setting("runs/ldm", "Folder that train_ldm.py wrote; may stand without the flag.")
    allow_real_images: bool = setting(
        False, "Pictures of real scans may leave: the report's page and figures are pushed as well."
    )


@dataclass(frozen=True)
class PushSamplesConfig(ShareConfig):
    """Settings of python -m adni_ldm.hub push-samples."""

    folder: str = setting("samples", "Folder that sample.py wrote; may stand without the flag.")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults behind each setting, and the recipe's own lines as they are written."""


def parse_config(
    config_class: type[Config],
    description: str,
    arguments: list[str] | None = None,
    prog: str | None = None,
) -> Config:
    """Settings from `--config FILE.yaml` and the flags that stand over it.

    Ends the program with argparse's usage message on a flag it does not know.

    Raises:
        UserError: the file is missing, is no mapping, or names a setting that does not exist.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(
        config_class,
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Settings to start from; flags stand over them."
    )
    path = parser.parse_known_args(arguments)[0].config
    if path:
        parser.set_defaults(**_read_yaml(Path(path), config_class))
    values = vars(parser.parse_args(arguments))
    values.pop("config")
    return config_class(**values)


def _read_yaml(path: Path, config_class: type) -> dict:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    values = yaml.safe_load(path.read_text()) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `setting: value`")
    known = {entry.name: entry for entry in dataclasses.fields(config_class)}
    if unknown := sorted(set(values) - set(known)):
        raise UserError(f"{path}: {', '.join(unknown)} is no setting of this recipe; see --help")
    for name, value in values.items():
        choices = known[name].metadata.get("choices")
        if choices and value not in choices:
            raise UserError(f"{path}: {name}: {value} is none of {', '.join(choices)}")
        if isinstance(known[name].default, float):
            values[name] = float(value)  # YAML reads 2e-3 as a word
    return values


# Of the training settings, these may differ when a run is resumed: they say where things lie and how often to
# look, or a hash of the data and weights says it better.
_FREE = {"data_dir", "table", "val_fraction", "output_dir", "vae", "init_from", "resume_from_checkpoint"}
_FREE |= {"mixed_precision", "num_workers", "report_to", "log_steps", "checkpointing_steps"}
_FREE |= {"keep_checkpoints", "max_nonfinite", "eval_images", "sample_steps", "num_inference_steps"}
_FREE |= {"evaluate_every", "evaluate_images", "evaluate_slices", "classifier_steps", "guidance_scale"}
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
