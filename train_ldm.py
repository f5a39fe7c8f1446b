"""Train a class-conditional latent diffusion model on the latents of a VAE.

    python train_ldm.py --config configs/demo/ldm.yaml
    accelerate launch --config_file accelerate_config.yaml train_ldm.py --config configs/adni/ldm.yaml

Writes a whole diffusers pipeline, which sample.py loads, and its metrics. Fine-tunes such a pipeline, or
Stable Diffusion, with --init_from, in parts (--freeze) or by LoRA (--lora_rank). --help lists all settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler

from adni_ldm.config import TrainLDMConfig, parse_config
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.generation import generate_images, image_seed
from adni_ldm.loading import load_autoencoder, load_base
from adni_ldm.models import ClassEmbedding, ConditionalDenoiser, build_denoiser, latent_shape
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.training import calibration, conditioning, finetuning, stable_targets
from adni_ldm.training.batch_sampling import BatchRandom
from adni_ldm.training.latents import LatentBatch, LatentPosteriors, encode_posteriors
from adni_ldm.training.losses import diffusion_loss
from adni_ldm.training.run import TrainingRun


def main() -> None:
    cfg = parse_config(TrainLDMConfig, __doc__)
    run = TrainingRun(cfg, "LDM", metrics=("loss", "val_loss", "kid", "class_accuracy", "copies"))
    finetuning.check_start(cfg.init_from, cfg.freeze, cfg.lora_rank, cfg.half_frozen, run.accelerator)

    # ---- Models, data and latents --------------------------------------------------------------------------
    vae_name = cfg.vae or cfg.init_from or "runs/vae"
    start = load_base(cfg.init_from, note=run.print, **cfg.base_options) if cfg.init_from else None
    vae = start.vae if start else load_autoencoder(vae_name)
    if vae.config.latents_mean is None and not cfg.measure_latents:
        raise UserError(f"--vae {vae_name}: its latents are not measured; fine-tune it with train_vae.py")
    train, val = run.load_slices(cfg.conditions)
    run.check_leakage(vae_name, vae)
    denoiser, scheduler = build(run, cfg, vae, start)
    denoiser.condition_embedding = conditioning.embed(cfg.conditions, cfg.token_dim, start, train, val)
    finetuning.choose_trained(denoiser, cfg.freeze, cfg.lora_rank, cfg.half_frozen, run.accelerator)
    if cfg.push_to_hub and run.is_main:
        from adni_ldm.hub.push import check_push, push_model

        parts = {"vae": vae, "unet": denoiser.unet, "class_embedding": denoiser.class_embedding}
        check_push(cfg.hub_model_id, run.data_dir, cfg.table, parts)  # now, and not after hours of training

    # Each slice is encoded once; its posterior is sampled anew at every step.
    vae.to(run.device).requires_grad_(False).eval()
    where = run.accelerator, cfg.latent_cache
    latents = encode_posteriors(vae, train, *where, run.hashes["train"], cfg.latent_variants)
    val_latents = encode_posteriors(vae, val, *where, run.hashes["val"])
    if cfg.measure_latents:
        vae.register_to_config(latents_mean=latents.mean, latents_std=latents.std)
    run.depends_on_latents(vae, latents)

    # ---- Train ---------------------------------------------------------------------------------------------
    run.prepare(denoiser, backbone=denoiser.unet)
    if cfg.evaluation_steps and run.is_main:
        from adni_ldm.evaluation.online import OnlineEvaluation, save_best

        evaluate = OnlineEvaluation(train, val, device=run.device, **cfg.online_evaluation)

    null = denoiser.class_embedding.null_label
    loss_of = partial(denoising_loss, vae=vae, scheduler=scheduler, null_label=null, gamma=cfg.snr_gamma)
    averaged = stable_targets.StableTargets(latents, vae, scheduler, null) if cfg.stable_targets else None
    for batch, rng in run.batches(latents):
        loss, tensors = loss_of(run.model, batch, rng, cfg.label_dropout, cfg.condition_dropout, averaged)
        run.step(loss, **tensors)

        # Validate the EMA weights: the other processes continue, and wait at the next gradient.
        validate_now, evaluate_now = run.every(cfg.validation_steps), run.every(cfg.evaluation_steps)
        if validate_now or evaluate_now:
            with run.ema_weights(), run.accelerator.autocast():
                parts = (vae, denoiser, scheduler, latents if evaluate_now else None)
                pipeline = build_pipeline(run, cfg, start, *parts)
                if run.is_main and validate_now:
                    save_samples(pipeline, run.output_dir / "samples.png", cfg.seed)
                    batches = run.validation_batches(val_latents, count=256)
                    run.log(val_loss=validation_loss(pipeline, batches, loss_of))
                if run.is_main and evaluate_now:
                    run.log(**(figures := evaluate(pipeline)))
                    save_best(pipeline, run.output_dir, run.updates, figures)

    # ---- Save the whole pipeline ---------------------------------------------------------------------------
    run.apply_ema()
    if cfg.lora_rank and run.is_main:
        finetuning.save_lora(denoiser, run.output_dir)
    pipeline = build_pipeline(run, cfg, start, vae, denoiser, scheduler, latents)
    run.save(pipeline, f"pipeline in {cfg.output_dir}: python sample.py --class all --model {cfg.output_dir}")
    if cfg.push_to_hub and run.is_main:
        push_model(run.output_dir, cfg.hub_model_id, [run.data_dir], cfg.table, accept_privacy_risk=True)


def denoising_loss(
    model: torch.nn.Module,
    batch: LatentBatch,
    rng: BatchRandom,
    label_dropout: float = 0.0,
    condition_dropout: float = 0.0,
    targets: stable_targets.StableTargets | None = None,
    *,
    vae: AutoencoderKL,
    scheduler: DDPMScheduler,
    null_label: int,
    gamma: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of one batch of slices, and the tensors that a report on non-finite losses describes."""
    # Noise the latents.
    clean = normalize_latents(vae, batch.sample(rng))  # (B, C, h, w)
    noise = rng.normal(*clean.shape[1:])  # (B, C, h, w)
    timesteps = rng.integers(scheduler.config.num_train_timesteps)  # (B,)
    noisy = scheduler.add_noise(clean, noise, timesteps)

    # Predict from the class tokens; some labels become the null class, for classifier-free guidance.
    dropped = rng.uniform() < label_dropout  # (B,)
    labels = torch.where(dropped, null_label, batch.labels)
    conditions = conditioning.drop(batch.conditions, dropped, rng, condition_dropout)  # (B, K), or None
    prediction = model(noisy, timesteps, labels, conditions)  # (B, C, h, w)

    # Compare with the noise or the velocity, or with their means over the slices that may be the noisy one.
    if targets:
        clean, noise = targets(clean, noisy, timesteps, labels, conditions, batch.indices)
    loss = diffusion_loss(prediction, clean, noise, timesteps, scheduler, gamma)
    return loss, {"clean": clean, "noisy": noisy, "prediction": prediction, "timesteps": timesteps}


def build(
    run: TrainingRun, cfg: TrainLDMConfig, vae: AutoencoderKL, start: ClassConditionalLDMPipeline | None
) -> tuple[ConditionalDenoiser, DDPMScheduler]:
    """The denoiser and its noise schedule: from scratch, or those of the pipeline to fine-tune."""
    channels, size, _ = latent_shape(vae, cfg.image_size)
    if start:
        run.check_leakage(cfg.init_from, start.unet)
        finetuning.set_latent_size(start.unet, channels, size)
        given = (cfg.prediction_type, cfg.rescale_betas_zero_snr)
        scheduler = finetuning.adapt_schedule(start.scheduler, *given, run.print, bool(cfg.lora_rank))
        unet, tokens = start.unet, start.class_embedding.with_classes(run.data.class_names)
    else:
        shape = (channels, size, cfg.unet_widths, cfg.token_dim, cfg.layers_per_block, cfg.attention_levels)
        unet = build_denoiser(*shape)
        tokens = ClassEmbedding(run.data.class_names, cfg.token_dim, cfg.tokens_per_class)
        scheduler = DDPMScheduler(
            num_train_timesteps=cfg.num_train_timesteps,
            **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            prediction_type=cfg.prediction_type,
            rescale_betas_zero_snr=cfg.rescale_betas_zero_snr,
            timestep_spacing="trailing",  # sampling starts at the last timestep, which is pure noise
            clip_sample=False,  # latents are not confined to [-1, 1]
        )
    denoiser = ConditionalDenoiser(unet, tokens)
    run.record_training(unet)
    run.depends_on(**{"weights of --init_from": denoiser} if start else {})
    return denoiser, scheduler


def build_pipeline(
    run: TrainingRun,
    cfg: TrainLDMConfig,
    start: ClassConditionalLDMPipeline | None,
    vae: AutoencoderKL,
    denoiser: ConditionalDenoiser,
    scheduler: DDPMScheduler,
    latents: LatentPosteriors | None,
) -> ClassConditionalLDMPipeline:
    """The present weights as a pipeline, LoRA merged, calibrated on `latents`, with DDIM as its sampler."""
    unet, tokens, conditions = (part and run.full_weights(part) for part in denoiser.parts)
    sampler = DDIMScheduler.from_config(scheduler.config)
    pipeline = ClassConditionalLDMPipeline(vae, finetuning.plain_unet(unet), tokens, sampler, conditions)
    pipeline.register_to_config(**(start or pipeline).sampling_settings(*cfg.sampling))  # saved with it
    if latents and cfg.linear_calibration and not cfg.lora_rank and run.is_main:
        calibration.calibrate(pipeline, latents, cfg.seed)
    return pipeline


@torch.no_grad()
def validation_loss(pipeline: ClassConditionalLDMPipeline, batches: Iterable, loss_of: Callable) -> float:
    """Mean loss of batches of held-out latents with their random numbers, no label dropped."""
    model = ConditionalDenoiser(pipeline.unet, pipeline.class_embedding, pipeline.condition_embedding)
    return torch.stack([loss_of(model, batch, rng)[0] for batch, rng in batches]).mean().item()


def save_samples(pipeline: ClassConditionalLDMPipeline, path: Path, seed: int, count: int = 8) -> None:
    """Save a row of samples of each class; a column starts from the same noise."""
    seeds = [image_seed(seed, index) for index in range(count)]
    names = pipeline.class_embedding.config.class_names
    images = (next(generate_images(pipeline, [label] * count, seeds, count)) for label in range(len(names)))
    save_rows(path, dict(zip(names, images)))


if __name__ == "__main__":
    run_recipe(main)
