"""Train the class-conditional latent diffusion model on the latents of a VAE.

    python train_ldm.py --config configs/demo/ldm.yaml
    accelerate launch --config_file accelerate_config.yaml train_ldm.py --config configs/adni/ldm.yaml

Writes a whole diffusers pipeline, which sample.py and `DiffusionPipeline.from_pretrained` read; beside it
metrics.csv, loss.png, samples.png and training_config.json. Fine-tunes such a pipeline with --init_from: on
other scans, with more classes, at another size; in parts (--freeze) or by a LoRA (--lora_rank), which is
saved alone as well, as pytorch_lora_weights.safetensors. `python train_ldm.py --help` lists every setting.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from huggingface_hub.constants import HF_HOME
from tqdm.auto import tqdm

from adni_ldm.config import TrainLDMConfig, class_names, parse_config, save_config, settings_to_keep
from adni_ldm.data.provenance import check_leakage, training_records
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.evaluation.image_sets import image_set
from adni_ldm.evaluation.online import OnlineEvaluation, save_best
from adni_ldm.figures import save_rows
from adni_ldm.generation import generate_images, hash_weights, image_seed
from adni_ldm.hub.push import check_login, push_model
from adni_ldm.loading import load_autoencoder, load_pipeline
from adni_ldm.models.autoencoder import latent_shape
from adni_ldm.models.class_embedding import ClassEmbedding
from adni_ldm.models.denoiser import ConditionalDenoiser, build_denoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.training.batch_sampling import BatchIndices, BatchNoise
from adni_ldm.training.checkpoints import (
    load_checkpoint,
    refuse_earlier_run,
    save_checkpoint,
    write_state,
)
from adni_ldm.training.compute import refuse_missing_kernels, set_kernels
from adni_ldm.training.ema import (
    average,
    averaged_weights,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
    trainable,
    update_average,
)
from adni_ldm.training.finetuning import (
    add_lora,
    fit,
    freeze,
    merge_lora,
    refuse_missing_start,
    save_lora,
)
from adni_ldm.training.fsdp import whole
from adni_ldm.training.latents import LatentPosteriors, encode_posteriors
from adni_ldm.training.losses import diffusion_loss
from adni_ldm.training.metrics import RunLog
from adni_ldm.training.run import describe, load_training_slices, on_gpu, start_accelerator
from adni_ldm.training.run_record import hash_slices, record_start, run_identity
from adni_ldm.training.update_guard import UpdateCheck, exit_code, stop_nonfinite

COLUMNS = ("loss", "learning_rate", "skipped", "val_loss", "kid", "agreement", "copies")


def main() -> int:
    cfg = parse_config(TrainLDMConfig, __doc__)
    output_dir = Path(cfg.output_dir)

    # ---- Processes, what to start from, and data -----------------------------------------------------------
    refuse_earlier_run(output_dir, cfg.resume_from_checkpoint)
    refuse_missing_kernels(cfg.attention, cfg.optimizer)
    refuse_missing_start(cfg.init_from, cfg.freeze, cfg.lora_rank)
    accelerator = start_accelerator(
        output_dir,
        cfg.mixed_precision,
        cfg.gradient_accumulation_steps,
        cfg.report_to,
        cfg.seed,
        cfg.batch_size,
        cfg.deterministic,
    )
    if cfg.push_to_hub and accelerator.is_main_process:
        check_login(cfg.hub_model_id)  # now, and not when training has ended
    pipeline = load_pipeline(cfg.init_from) if cfg.init_from else None
    vae_name = cfg.vae or cfg.init_from or "runs/vae"
    vae = pipeline.vae if pipeline and not cfg.vae else load_autoencoder(vae_name)
    if vae.config.latents_mean is None:
        raise UserError(
            f"--vae {vae_name}: its latents are not measured; fine-tune it with train_vae.py --init_from"
        )
    channels, size, _ = latent_shape(vae, cfg.image_size)
    train, val, data = load_training_slices(
        accelerator, cfg.data_dir, cfg.image_size, cfg.val_fraction, class_names(cfg.classes), cfg.table
    )
    check_leakage(vae_name, vae.config.get("_trained_on"), data)
    accelerator.print(f"{len(train)} training slices, {len(val)} held out; {describe(accelerator)}")

    # ---- Denoiser and noise schedule -----------------------------------------------------------------------
    if pipeline:
        check_leakage(cfg.init_from, pipeline.unet.config.get("_trained_on"), data)
        fit(pipeline.unet, channels, size)
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        tokens = pipeline.class_embedding.with_classes(data.class_names)
        denoiser = ConditionalDenoiser(pipeline.unet, tokens)
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
    unet.register_to_config(_trained_on=training_records(data, unet.config.get("_trained_on")))
    start = {"weights of --init_from": hash_weights(denoiser)} if pipeline else {}
    if cfg.lora_rank:
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UserError("--lora_rank is small enough for each GPU; start without FSDP")
        add_lora(unet, cfg.lora_rank)
    freeze(denoiser, cfg.freeze)

    # ---- Latents: encoded once, their posterior drawn anew each step ---------------------------------------
    vae.to(accelerator.device).requires_grad_(False).eval()
    cache = cfg.latent_cache or Path(HF_HOME, "adni_ldm", "latents")
    hashes = hash_slices(accelerator, data, cfg.image_size, train=train, val=val)
    latents = encode_posteriors(vae, train, accelerator, cache, hashes["train"], cfg.latent_variants)
    val_latents = encode_posteriors(vae, val, accelerator, cache, hashes["val"])

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
    optimizer = build_optimizer(cfg.optimizer, trainable(denoiser), cfg.learning_rate, cfg.weight_decay)
    model, optimizer = accelerator.prepare(denoiser, optimizer)
    trained = trainable(denoiser)  # after prepare, which may have put others in their place
    ema = None
    if cfg.use_ema:
        images = cfg.batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
        device = "cpu" if cfg.offload_ema else accelerator.device
        ema = average(trained, cfg.ema_halflife_images, images, device)

    # ---- Resume and run folder -----------------------------------------------------------------------------
    hashes |= {"vae": hash_weights(vae), **start}
    identity = run_identity(accelerator, settings_to_keep(cfg), data.hash, **hashes)
    identity["should"]["latents"] = latents.sha256
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
    if cfg.evaluation_steps and accelerator.is_main_process:
        watch = OnlineEvaluation(
            *(image_set(part, cfg.evaluate_slices, cfg.seed) for part in (train, val)),
            count=cfg.evaluate_images,
            classifier_steps=cfg.classifier_steps,
            steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            seed=cfg.seed,
            device=accelerator.device,
        )

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
            update_average(ema, trained)
        progress.update()

        # Log, look at held-out latents and samples, and save.
        last = step == cfg.max_steps
        if step % cfg.log_steps == 0 or last:
            line = log.write_means(step, learning_rate=learning_rate, skipped=check.skipped)
            progress.set_postfix(loss=f"{line['loss']:.4f}")
        if cfg.validation_steps and (step % cfg.validation_steps == 0 or last):
            with averaged_weights(ema, trained), accelerator.autocast():
                sampled = whole_denoiser(denoiser)
                if accelerator.is_main_process:  # the others go on, and wait at the next gradient
                    held_out = held_out_loss(sampled, val_latents, vae, scheduler, cfg)
                    draw_samples(build_pipeline(vae, sampled, scheduler), output_dir / "samples.png", cfg)
                    log.write(step, val_loss=held_out)
        if cfg.evaluation_steps and (step % cfg.evaluation_steps == 0 or last):
            with averaged_weights(ema, denoiser.parameters()), accelerator.autocast():
                sampled = whole_denoiser(denoiser)
                if accelerator.is_main_process:
                    judged = build_pipeline(vae, sampled, scheduler)
                    judged.set_progress_bar_config(disable=True)
                    figures = watch(judged)
                    log.write(step, **figures)
                    save_best(judged, output_dir, step, figures)
        due = cfg.checkpointing_steps and step % cfg.checkpointing_steps == 0
        if (due or check.stop) and not last:
            save_checkpoint(
                accelerator, output_dir, step, cfg.checkpoints_total_limit, **state, **check.counts
            )
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
        ema.copy_to(trained)
    denoiser = whole_denoiser(denoiser)
    if accelerator.is_main_process:
        if cfg.lora_rank:
            save_lora(denoiser, output_dir)
            merge_lora(denoiser.unet)
        build_pipeline(vae, denoiser, scheduler).save_pretrained(output_dir)
    log.draw()
    accelerator.end_training()
    accelerator.print(f"pipeline in {output_dir}: python sample.py --class all --model {output_dir}")
    if cfg.push_to_hub and accelerator.is_main_process:
        push_model(output_dir, cfg.hub_model_id, [cfg.data_dir], cfg.table, accept_privacy_risk=True)
    return 0


def whole_denoiser(denoiser: ConditionalDenoiser) -> ConditionalDenoiser:
    """The denoiser with whole weights, gathered where FSDP shards them; every process calls it."""
    return ConditionalDenoiser(whole(denoiser.unet), whole(denoiser.class_embedding))


def noise_latents(
    latents: LatentPosteriors,
    indices: list[int],
    random: BatchNoise,
    vae: AutoencoderKL,
    scheduler: DDPMScheduler,
) -> tuple[torch.Tensor, ...]:
    """Draw latents and noise them: clean, noise, noisy (B, C, h, w) and timesteps (B,)."""
    shape = latents.shape
    variants = random.integers(latents.variants) if latents.variants > 1 else 0
    clean = normalize_latents(vae, latents.draw(indices, random.normal(*shape), variants))
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
        random = BatchNoise(cfg.seed, batch, cfg.batch_size, 0, 1, latents.labels.device)
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
        rows[name] = torch.cat(list(generate_images(pipeline, [label] * count, seeds, count, **options)))
    save_rows(path, rows)


if __name__ == "__main__":
    run_recipe(main)
