"""Train the autoencoder that turns slices into latents and back.

    python train_vae.py --config configs/demo/vae.yaml
    accelerate launch --config_file accelerate_config.yaml train_vae.py --config configs/adni/vae.yaml

Writes a diffusers AutoencoderKL folder with the latents' mean and standard deviation over the training set
in its config.json; beside it metrics.csv, loss.png, reconstructions.png and training_config.json. Fine-tunes
any diffusers AutoencoderKL with --init_from, one of colour as well. `python train_vae.py --help` lists every
setting.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from adni_ldm.config import TrainVAEConfig, class_names, parse_config, save_config, settings_to_keep
from adni_ldm.data.provenance import check_leakage, training_records
from adni_ldm.data.slices import SliceTensors, evenly_spaced
from adni_ldm.errors import run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.generation import hash_weights
from adni_ldm.loading import load_autoencoder
from adni_ldm.models.autoencoder import ReconstructingVAE, build_autoencoder, latent_shape
from adni_ldm.training.adversarial_loss import Adversary, Discriminator, refuse_sharding
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
    update_average,
)
from adni_ldm.training.fsdp import whole
from adni_ldm.training.latents import channel_statistics, encode_slices
from adni_ldm.training.losses import kl_divergence, reconstruction_loss, spectral_loss
from adni_ldm.training.metrics import RunLog
from adni_ldm.training.perceptual_loss import load_perception
from adni_ldm.training.run import describe, load_training_slices, on_gpu, start_accelerator
from adni_ldm.training.run_record import hash_slices, record_start, run_identity
from adni_ldm.training.update_guard import UpdateCheck, exit_code, ignore_stop_signals, stop_nonfinite

COLUMNS = ("loss", "reconstruction_loss", "spectral_loss", "perceptual_loss", "kl")
COLUMNS += ("adversarial_loss", "discriminator_loss", "learning_rate", "skipped")
COLUMNS += ("val_psnr", "val_ssim", "val_kl")


def main() -> int:
    cfg = parse_config(TrainVAEConfig, __doc__)
    output_dir = Path(cfg.output_dir)

    # ---- Processes and data --------------------------------------------------------------------------------
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
    train, val, data = load_training_slices(
        accelerator, cfg.data_dir, cfg.image_size, cfg.val_fraction, class_names(cfg.classes), cfg.table
    )
    accelerator.print(f"{len(train)} training slices, {len(val)} held out; {describe(accelerator)}")

    # ---- Model, what judges it, and optimizer --------------------------------------------------------------
    if cfg.init_from:
        vae = load_autoencoder(cfg.init_from)
        check_leakage(f"--init_from {cfg.init_from}", vae.config.get("_trained_on"), data)
    else:
        vae = build_autoencoder(
            cfg.image_size, cfg.latent_channels, cfg.widths, cfg.layers_per_block, cfg.mid_attention
        )
    shape = latent_shape(vae, cfg.image_size)  # (C, h, w)
    model = ReconstructingVAE(vae, decode_in_float32=accelerator.mixed_precision == "fp16")
    channels_last = cfg.channels_last if cfg.channels_last is not None else on_gpu(accelerator)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    set_kernels(
        [vae],
        [vae.encoder, vae.decoder.mid_block, *vae.decoder.up_blocks],  # the adversary asks the last layer
        gradient_checkpointing=cfg.gradient_checkpointing,
        attention=cfg.attention,
        on_cpu=not on_gpu(accelerator),
        compile=cfg.compile,
    )
    refuse_sharding(accelerator, cfg.discriminator_weight)
    with accelerator.main_process_first():
        perception = load_perception(cfg.perceptual)
    if perception:
        perception.to(accelerator.device)
    networks = [model]
    if cfg.discriminator_weight:
        networks.append(Discriminator(cfg.discriminator_width))
    # One optimizer for both: gradient scaling and the checks below then see one update.
    weights = [{"params": list(network.parameters())} for network in networks]
    optimizer = build_optimizer(
        cfg.optimizer, weights, cfg.learning_rate, cfg.weight_decay, betas=(0.9, 0.99)
    )
    *trained, optimizer = accelerator.prepare(*networks, optimizer)
    model, adversary = trained[0], None
    if cfg.discriminator_weight:
        last_layer = vae.decoder.conv_out.weight
        adversary = Adversary(accelerator, networks[1], trained[1], last_layer, cfg.discriminator_weight)
    ema = None
    if cfg.use_ema:
        images = cfg.batch_size * cfg.gradient_accumulation_steps * accelerator.num_processes
        device = "cpu" if cfg.offload_ema else accelerator.device
        ema = average(vae.parameters(), cfg.ema_halflife_images, images, device)

    # ---- Resume and run folder -----------------------------------------------------------------------------
    hashes = hash_slices(accelerator, data, cfg.image_size, train=train, val=val)
    if perception:
        hashes["perceptual"] = hash_weights(perception)
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
    accumulation = cfg.gradient_accumulation_steps
    rows = {"process": accelerator.process_index, "num_processes": accelerator.num_processes}
    batches = BatchIndices(
        len(train), cfg.batch_size, cfg.seed, step * accumulation, cfg.max_steps * accumulation, **rows
    )
    workers = cfg.num_workers if cfg.num_workers is not None else 2 * on_gpu(accelerator)
    loader = DataLoader(train, batch_sampler=batches, num_workers=workers, worker_init_fn=ignore_stop_signals)
    epoch_steps = max(1, len(train) // (cfg.batch_size * accumulation * accelerator.num_processes))
    adversary_start = cfg.max_steps // 2 if cfg.discriminator_start is None else cfg.discriminator_start
    zero = torch.zeros((), device=accelerator.device)
    progress = tqdm(
        total=cfg.max_steps, initial=step, desc="training VAE", disable=not accelerator.is_main_process
    )
    check.listen()
    for number, batch in enumerate(loader, start=step * accumulation):
        images = batch["image"].to(accelerator.device)  # (B, 1, H, W)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        noise = BatchNoise(cfg.seed, number, cfg.batch_size, **rows, device=accelerator.device)

        learning_rate = learning_rate_at(step, cfg.learning_rate, cfg.warmup_steps, cfg.max_steps)
        opposed = adversary is not None and step >= adversary_start
        with accelerator.accumulate(*trained):
            set_learning_rate(optimizer, learning_rate)
            reconstruction, mean, logvar = model(images, noise.normal(*shape))
            distance = reconstruction_loss(reconstruction, images, cfg.reconstruction_loss)
            spectral = spectral_loss(reconstruction, images) if cfg.spectral_weight else zero
            perceptual = perception(reconstruction, images) if perception else zero
            likeness = distance + cfg.spectral_weight * spectral + cfg.perceptual_weight * perceptual
            fooling, telling = adversary.losses(images, reconstruction, likeness) if opposed else (zero, zero)
            kl = kl_divergence(mean, logvar)
            loss = likeness + cfg.kl_weight * kl + fooling
            accelerator.backward(loss + telling)  # the autoencoder's and the discriminator's share no weight
            terms = {"loss": loss, "reconstruction_loss": distance, "kl": kl}
            terms |= {"spectral_loss": spectral} if cfg.spectral_weight else {}
            terms |= {"perceptual_loss": perceptual} if perception else {}
            terms |= {"adversarial_loss": fooling, "discriminator_loss": telling} if adversary else {}
            log.add(**terms)
            check.add(loss + telling, images=images, mean=mean, logvar=logvar)
            if not accelerator.sync_gradients:
                continue
            norm = accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            if opposed:
                norm = norm + adversary.end_update(cfg.max_grad_norm)  # for the check: one is not finite
            if not check.passes(norm):
                optimizer.zero_grad()  # without gradients the step below changes nothing
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if ema and check.taken:
            update_average(ema, vae.parameters())
        progress.update()

        # Log, look at held-out slices each epoch, and save.
        last = step == cfg.max_steps
        if step % cfg.log_steps == 0 or last:
            line = log.write_means(step, learning_rate=learning_rate, skipped=check.skipped)
            progress.set_postfix(loss=f"{line['loss']:.4f}")
        if step % epoch_steps == 0 or last:
            with averaged_weights(ema, vae.parameters()):
                whole_vae = whole(vae)
                indices = evenly_spaced(len(val), len(val) if last else cfg.eval_images)
                quality = measure(whole_vae, val, indices, cfg.batch_size, accelerator)
                if accelerator.is_main_process:
                    draw_reconstructions(
                        whole_vae, val, output_dir / "reconstructions.png", accelerator.device
                    )
            log.write(step, **quality)
            if accelerator.is_main_process:
                text = "step {}: held-out PSNR {val_psnr:.2f} dB, SSIM {val_ssim:.3f}"
                progress.write(text.format(step, **quality))
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

    # ---- Measure the latents and save ----------------------------------------------------------------------
    if ema:
        ema.copy_to(vae.parameters())
    vae = whole(vae)
    mean, std = channel_statistics(encode_slices(vae, train, accelerator))
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    vae.register_to_config(_trained_on=training_records(data, vae.config.get("_trained_on")))
    if accelerator.is_main_process:
        vae.save_pretrained(output_dir)
    log.draw()
    accelerator.end_training()
    accelerator.print(f"VAE in {output_dir}: reconstructions.png shows what it keeps")
    return 0


@torch.no_grad()
def measure(
    vae: AutoencoderKL, slices: SliceTensors, indices: list[int], batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean PSNR (dB), SSIM and KL (nats per latent element) of slices decoded from the posterior's mean.

    Per slice, in float32; each process its share.
    """
    sums = torch.zeros(4, device=accelerator.device)
    share = indices[accelerator.process_index :: accelerator.num_processes]
    for batch in DataLoader(Subset(slices, share), batch_size=batch_size):
        images = batch["image"].to(accelerator.device)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.mean, return_dict=False)[0].clamp(-1, 1)
        pairs = (reconstruction, images)
        psnr = peak_signal_noise_ratio(*pairs, data_range=2.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(*pairs, data_range=2.0, reduction="none")
        kl = kl_divergence(posterior.mean, posterior.logvar) * len(images)
        sums += torch.stack([psnr.sum(), ssim.sum(), kl, torch.tensor(len(images), device=images.device)])
    psnr, ssim, kl, count = accelerator.reduce(sums, "sum").tolist()
    return {"val_psnr": psnr / count, "val_ssim": ssim / count, "val_kl": kl / count}


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKL, slices: SliceTensors, path: Path, device: torch.device) -> None:
    """Picture of ten held-out slices above what the autoencoder makes of them."""
    images = torch.stack(
        [slices[index]["image"] for index in evenly_spaced(len(slices), 10)]
    )  # (10, 1, H, W)
    latents = vae.encode(images.to(device)).latent_dist.mean
    reconstruction = vae.decode(latents, return_dict=False)[0]
    rows = {"real": images, "reconstructed": reconstruction}
    save_rows(path, {title: (row / 2 + 0.5).clamp(0, 1) for title, row in rows.items()})


if __name__ == "__main__":
    run_recipe(main)
