"""Train the class-conditional latent diffusion model on the latents of a VAE.

    python train_ldm.py --config configs/demo/ldm.yaml
    accelerate launch --config_file accelerate_config.yaml train_ldm.py --config configs/adni/ldm.yaml

Writes a whole diffusers pipeline, which sample.py and `DiffusionPipeline.from_pretrained` read; beside it
metrics.csv, loss.png, samples.png and training_config.json. Fine-tunes such a pipeline with --init_from.
`python train_ldm.py --help` lists every setting.
"""

from __future__ import annotations

from adni_ldm.environment import check_torch_pair

check_torch_pair()  # before diffusers and transformers meet a broken pair and say something else

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from tqdm.auto import tqdm

from adni_ldm.config import TrainLDMConfig, class_names, parse_config, save_config, settings_to_keep
from adni_ldm.data.lineage import refuse_leak, trained_on
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.loading import load_autoencoder, load_pipeline
from adni_ldm.models.autoencoder import latent_shape
from adni_ldm.models.class_embedding import ClassEmbedding
from adni_ldm.models.denoiser import ConditionalDenoiser, build_denoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.sampling import draw_images, hash_weights, image_seed
from adni_ldm.training.batches import BatchIndices, BatchNoise
from adni_ldm.training.checkpoints import (
    load_checkpoint,
    refuse_earlier_run,
    save_checkpoint,
    write_state,
)
from adni_ldm.training.kernels import refuse_missing_kernels, set_kernels
from adni_ldm.training.latents import LatentPosteriors, encode_posteriors
from adni_ldm.training.log import RunLog
from adni_ldm.training.losses import diffusion_loss
from adni_ldm.training.optimization import (
    average,
    averaged_weights,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
    update_average,
)
from adni_ldm.training.record import hash_slices, record_start, run_identity
from adni_ldm.training.setup import describe, load_training_slices, on_gpu, start_accelerator
from adni_ldm.training.sharding import whole
from adni_ldm.training.updates import UpdateCheck, exit_code, stop_nonfinite

COLUMNS = ("loss", "learning_rate", "skipped", "val_loss")


def main() -> int:
    cfg = parse_config(TrainLDMConfig, __doc__)
    output_dir = Path(cfg.output_dir)

    # ---- Processes, what to start from, and data -----------------------------------------------------------
    refuse_earlier_run(output_dir, cfg.resume_from_checkpoint)
    refuse_missing_kernels(cfg.attention, cfg.optimizer)
    accelerator = start_accelerator(
        output_dir,
        cfg.mixed_precision,
        cfg.gradient_accumulation_steps,
        cfg.report_to,
        cfg.seed,
        cfg.batch_size,
        cfg.deterministic,
    )
    pipeline = load_pipeline(cfg.init_from) if cfg.init_from else None
    vae = pipeline.vae if pipeline else load_autoencoder(cfg.vae)
    channels, size, _ = latent_shape(vae, cfg.image_size)
    train, val, data = load_training_slices(
        accelerator, cfg.data_dir, cfg.image_size, cfg.val_fraction, class_names(cfg.classes), cfg.table
    )
    refuse_leak(cfg.init_from or cfg.vae, vae.config.get("_trained_on"), data)
    accelerator.print(f"{len(train)} training slices, {len(val)} held out; {describe(accelerator)}")

    # ---- Denoiser and noise schedule -----------------------------------------------------------------------
    if pipeline:
        refuse_leak(cfg.init_from, pipeline.unet.config.get("_trained_on"), data)
        refuse_mismatch(pipeline, data.class_names, size)
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        denoiser = ConditionalDenoiser(pipeline.unet, pipeline.class_embedding)
    else:
        unet = build_denoiser(channels, size, cfg.unet_widths, cfg.token_dim, cfg.layers_per_block)
        denoiser = ConditionalDenoiser(unet, ClassEmbedding(data.class_names, cfg.token_dim))
        scheduler = DDPMScheduler(
            num_train_timesteps=cfg.num_train_timesteps,
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type=cfg.prediction_type,
            rescale_betas_zero_snr=cfg.rescale_betas_zero_snr,
            timestep_spacing="trailing",  # sampling starts at the last timestep, which is pure noise
            clip_sample=False,  # latents are not confined to [-1, 1]
        )

    unet = denoiser.unet
    unet.register_to_config(_trained_on=trained_on(data, unet.config.get("_trained_on")))

    # ---- Latents: encoded once, their posterior drawn anew each step ---------------------------------------
    vae.to(accelerator.device).requires_grad_(False).eval()
    latents, val_latents = (
        encode_posteriors(vae, part, cfg.batch_size, accelerator) for part in (train, val)
    )

    # ---- Optimizer -----------------------------------------------------------------------------------------
    channels_last = cfg.channels_last if cfg.channels_last is not None else on_gpu(accelerator)
    if channels_last:
        denoiser = denoiser.to(memory_format=torch.channels_last)
    set_kernels(
        [denoiser.unet],
        [denoiser.unet],
        gradient_checkpointing=cfg.gradient_checkpointing,
        attention=cfg.attention,
        on_cpu=not on_gpu(accelerator),
        compile=cfg.compile,
    )
    optimizer = build_optimizer(cfg.optimizer, denoiser.parameters(), cfg.learning_rate, cfg.weight_decay)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    ema = None
    if cfg.use_ema:
        ema = average(denoiser.parameters(), cfg.ema_decay, "cpu" if cfg.offload_ema else accelerator.device)

    # ---- Resume and run folder -----------------------------------------------------------------------------
    pixels = hash_slices(train, val) if accelerator.is_main_process else ""
    hashes = {"pixels": pixels, "vae": hash_weights(vae)}
    identity = run_identity(accelerator, settings_to_keep(cfg), data.hash, **hashes)
    state = {"identity": identity, "ema": ema}
    resumed = load_checkpoint(accelerator, output_dir, cfg.resume_from_checkpoint, **state)
    step = resumed.pop("step")
    check = UpdateCheck(accelerator, cfg.max_nonfinite, **resumed)
    if accelerator.is_main_process:
        save_config(cfg, output_dir)
        record_start(output_dir, step, identity)
    if cfg.report_to != "none":
        accelerator.init_trackers("logs")
    log = RunLog(accelerator, output_dir, COLUMNS, resumed_at=step)

    # ---- Train ---------------------------------------------------------------------------------------------
    null_label = denoiser.class_embedding.null_label
    accumulation = cfg.gradient_accumulation_steps
    rows = {"process": accelerator.process_index, "num_processes": accelerator.num_processes}
    batches = BatchIndices(
        len(latents), cfg.batch_size, cfg.seed, step * accumulation, cfg.max_steps * accumulation, **rows
    )
    progress = tqdm(
        total=cfg.max_steps, initial=step, desc="training LDM", disable=not accelerator.is_main_process
    )
    check.listen()
    for number, indices in enumerate(batches, start=step * accumulation):
        random = BatchNoise(cfg.seed, number, cfg.batch_size, **rows, device=accelerator.device)
        clean, noise, noisy, timesteps = noise_latents(latents, indices, random, vae, scheduler)
        labels = latents.labels[indices]  # (B,)
        labels = torch.where(random.uniform() < cfg.label_dropout, null_label, labels)

        learning_rate = learning_rate_at(step, cfg.learning_rate, cfg.warmup_steps, cfg.max_steps)
        with accelerator.accumulate(model):
            set_learning_rate(optimizer, learning_rate)
            prediction = model(noisy, timesteps, labels)  # (B, C, h, w)
            loss = diffusion_loss(prediction, clean, noise, timesteps, scheduler, cfg.snr_gamma)
            accelerator.backward(loss)
            log.add(loss=loss)
            check.add(loss, clean=clean, noisy=noisy, prediction=prediction, timesteps=timesteps)
            if not accelerator.sync_gradients:
                continue
            norm = accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            if not check.passes(norm):
                optimizer.zero_grad()  # without gradients the step below changes nothing
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if ema and check.taken:
            update_average(ema, denoiser.parameters())
        progress.update()

        # Log, look at held-out latents and samples, and save.
        last = step == cfg.max_steps
        if step % cfg.log_steps == 0 or last:
            line = log.write_means(step, learning_rate=learning_rate, skipped=check.skipped)
            progress.set_postfix(loss=f"{line['loss']:.4f}")
        if cfg.sample_steps and (step % cfg.sample_steps == 0 or last):
            with averaged_weights(ema, denoiser.parameters()), accelerator.autocast():
                sampled = whole_denoiser(denoiser)
                if accelerator.is_main_process:  # the others go on, and wait at the next gradient
                    held_out = held_out_loss(sampled, val_latents, vae, scheduler, cfg)
                    draw_samples(build_pipeline(vae, sampled, scheduler), output_dir / "samples.png", cfg)
                    log.write(step, val_loss=held_out)
        due = cfg.checkpointing_steps and step % cfg.checkpointing_steps == 0
        if (due or check.stop) and not last:
            save_checkpoint(accelerator, output_dir, step, cfg.keep_checkpoints, **state, **check.counts)
        if check.exhausted:
            diagnostic = output_dir / "nonfinite"
            write_state(accelerator, diagnostic, step, **state, **check.counts)
            stop_nonfinite(
                accelerator, diagnostic, step, check, model.parameters(), learning_rate=learning_rate
            )
        if check.stop and not last:
            accelerator.end_training()
            accelerator.print(f"{check.stop.name}: stopped after step {step}, whose checkpoint is written")
            return exit_code(check.stop)
    progress.close()

    # ---- Save the whole pipeline ---------------------------------------------------------------------------
    if ema:
        ema.copy_to(denoiser.parameters())
    denoiser = whole_denoiser(denoiser)
    if accelerator.is_main_process:
        build_pipeline(vae, denoiser, scheduler).save_pretrained(output_dir)
    log.draw()
    accelerator.end_training()
    accelerator.print(f"pipeline in {output_dir}: python sample.py --class all --model {output_dir}")
    return 0


def whole_denoiser(denoiser: ConditionalDenoiser) -> ConditionalDenoiser:
    """The denoiser with whole weights, gathered where FSDP shards them; every process calls it."""
    return ConditionalDenoiser(whole(denoiser.unet), whole(denoiser.class_embedding))


def refuse_mismatch(
    pipeline: ClassConditionalLDMPipeline, class_names: tuple[str, ...], latent_size: int
) -> None:
    """Fine-tuning keeps the meaning of every label and the size of the slices."""
    known = tuple(pipeline.class_embedding.config.class_names)
    if known != class_names:
        raise UserError(
            f"--init_from: its classes are {', '.join(known)}, the data's {', '.join(class_names)}"
        )
    if pipeline.unet.config.sample_size != latent_size:
        size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        raise UserError(f"--init_from: it draws slices of {size} pixels; give --image_size {size}")


def noise_latents(
    latents: LatentPosteriors,
    indices: list[int],
    random: BatchNoise,
    vae: AutoencoderKL,
    scheduler: DDPMScheduler,
) -> tuple[torch.Tensor, ...]:
    """Draw latents and noise them: clean, noise, noisy (B, C, h, w) and timesteps (B,)."""
    shape = latents.mean.shape[1:]
    clean = normalize_latents(vae, latents.draw(indices, random.normal(*shape)))
    noise = random.normal(*shape)
    timesteps = random.integers(scheduler.config.num_train_timesteps)
    return clean, noise, scheduler.add_noise(clean, noise, timesteps), timesteps


@torch.no_grad()
def held_out_loss(
    denoiser: ConditionalDenoiser,
    latents: LatentPosteriors,
    vae: AutoencoderKL,
    scheduler: DDPMScheduler,
    cfg: TrainLDMConfig,
) -> float:
    """Loss on the first of the held-out latents, the same noise and timesteps each time."""
    losses = []
    for batch in range(max(1, min(len(latents), 256) // cfg.batch_size)):
        indices = [
            index % len(latents) for index in range(batch * cfg.batch_size, (batch + 1) * cfg.batch_size)
        ]
        random = BatchNoise(cfg.seed, batch, cfg.batch_size, 0, 1, latents.mean.device)
        clean, noise, noisy, timesteps = noise_latents(latents, indices, random, vae, scheduler)
        prediction = denoiser(noisy, timesteps, latents.labels[indices])
        losses.append(diffusion_loss(prediction, clean, noise, timesteps, scheduler, cfg.snr_gamma))
    return torch.stack(losses).mean().item()


def build_pipeline(
    vae: AutoencoderKL, denoiser: ConditionalDenoiser, scheduler: DDPMScheduler
) -> ClassConditionalLDMPipeline:
    """What was trained, with DDIM on the same noise schedule."""
    sampler = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
    return ClassConditionalLDMPipeline(vae, denoiser.unet, denoiser.class_embedding, sampler)


def draw_samples(
    pipeline: ClassConditionalLDMPipeline, path: Path, cfg: TrainLDMConfig, count: int = 8
) -> None:
    """Picture of a row of samples of each class; a column starts from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    seeds = [image_seed(cfg.seed, index) for index in range(count)]
    options = {"num_inference_steps": cfg.num_inference_steps, "guidance_scale": cfg.guidance_scale}
    rows = {}
    for label, name in enumerate(pipeline.class_embedding.config.class_names):
        rows[name] = torch.cat(list(draw_images(pipeline, [label] * count, seeds, count, **options)))
    save_rows(path, rows)


if __name__ == "__main__":
    run_recipe(main)
