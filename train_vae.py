"""Train the autoencoder (VAE) that encodes slices into latents and decodes them.

    python train_vae.py --config configs/demo/vae.yaml
    accelerate launch --config_file accelerate_config.yaml train_vae.py --config configs/adni/vae.yaml

Writes an AutoencoderKL folder with the mean and standard deviation of the latents over the training
set in its config.json; beside it metrics.csv, loss.png, reconstructions.png and training_config.json.
Fine-tunes any diffusers AutoencoderKL with --init_from, those of colour images included; with --decoder_only
its latents stay as they are. `python train_vae.py --help` lists every setting.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from adni_ldm.config import TrainVAEConfig, parse_config
from adni_ldm.data.slices import SliceTensors, evenly_spaced
from adni_ldm.errors import run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.loading import load_autoencoder
from adni_ldm.models import ReconstructingVAE, SliceAutoencoder, build_autoencoder, latent_shape
from adni_ldm.training.adversarial_loss import AdversarialLoss, PatchDiscriminator, check_adversarial_loss
from adni_ldm.training.latents import channel_statistics, encode_slices, latent_encoder
from adni_ldm.training.losses import kl_divergence, reconstruction_loss, spectral_loss
from adni_ldm.training.perceptual_loss import load_perceptual_loss
from adni_ldm.training.run import TrainingRun

LOSSES = ("loss", "reconstruction_loss", "spectral_loss", "perceptual_loss", "kl")
LOSSES += ("adversarial_loss", "discriminator_loss")


def main() -> None:
    cfg = parse_config(TrainVAEConfig, __doc__)
    run = TrainingRun(cfg, "VAE", metrics=(*LOSSES, "val_psnr", "val_ssim", "val_kl"))
    check_adversarial_loss(run.accelerator, cfg.discriminator_weight)

    # ---- Data, model and what it is trained against --------------------------------------------------------
    train, val = run.load_slices()
    vae = build(run, cfg)
    model = ReconstructingVAE(vae, decode_in_float32=run.accelerator.mixed_precision == "fp16")
    with run.accelerator.main_process_first():
        perceptual_loss = load_perceptual_loss(cfg.perceptual)
    if perceptual_loss:
        perceptual_loss.to(run.device)
        run.depends_on(perceptual=perceptual_loss)
    discriminator = PatchDiscriminator(cfg.discriminator_width) if cfg.discriminator_weight else None
    networks = [model, discriminator] if discriminator else [model]
    # Not the decoder's last layer: the adversarial loss needs the gradient at its weight.
    compiled = [vae.encoder, vae.decoder.mid_block, *vae.decoder.up_blocks]
    run.prepare(*networks, backbone=vae, compiled=compiled, betas=(0.9, 0.99))
    if discriminator:
        last_layer = vae.decoder.conv_out.weight
        adversarial_loss = AdversarialLoss(
            run.accelerator, discriminator, run.models[1], last_layer, cfg.discriminator_weight
        )
    adversarial_start = cfg.max_steps // 2 if cfg.discriminator_start is None else cfg.discriminator_start

    # ---- Train ---------------------------------------------------------------------------------------------
    shape = latent_shape(vae, cfg.image_size)  # (C, h, w)
    epoch = max(1, len(train) // run.images_per_update)
    zero = torch.zeros((), device=run.device)
    kl_weight = 0.0 if cfg.decoder_only else cfg.kl_weight  # a frozen encoder has a constant one
    for batch, rng in run.batches(train):
        images = batch["image"]  # (B, 1, H, W), [-1, 1]
        adversarial = discriminator is not None and run.updates >= adversarial_start

        # Reconstruct from a sample of the posterior.
        reconstruction, mean, logvar = run.model(images, rng.normal(*shape))

        # Compare: pixels, amplitudes of frequencies, features of a pretrained network, patches.
        distance = reconstruction_loss(reconstruction, images, cfg.reconstruction_loss)
        spectral = spectral_loss(reconstruction, images) if cfg.spectral_weight else zero
        perceptual = perceptual_loss(reconstruction, images) if perceptual_loss else zero
        rec_loss = distance + cfg.spectral_weight * spectral + cfg.perceptual_weight * perceptual
        g_loss, d_loss = zero, zero
        if adversarial:
            g_loss, d_loss = adversarial_loss(images, reconstruction, rec_loss)
        kl = kl_divergence(mean, logvar)
        loss = rec_loss + kl_weight * kl + g_loss

        # Learn. Autoencoder and discriminator share no weight, so one backward pass serves both losses.
        metrics = {"loss": loss, "reconstruction_loss": distance, "kl": kl}
        metrics |= {"spectral_loss": spectral} if cfg.spectral_weight else {}
        metrics |= {"perceptual_loss": perceptual} if perceptual_loss else {}
        metrics |= {"adversarial_loss": g_loss, "discriminator_loss": d_loss} if discriminator else {}
        run.step(loss + d_loss, metrics, images=images, mean=mean, logvar=logvar)
        if adversarial and run.updated:
            adversarial_loss.end_update()

        # Validate the EMA weights each epoch.
        if run.every(epoch):
            with run.ema_weights():
                validate(run, cfg, vae, val)

    # ---- Measure the latents, unless they were measured and are the same, and save -------------------------
    run.apply_ema()
    vae = run.full_weights(vae)
    if not (cfg.decoder_only and vae.config.latents_mean):
        mean, std = channel_statistics(encode_slices(vae, train, run.accelerator))
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    measure_decoder_noise(vae, val, cfg.batch_size, run.device)
    run.record_training(vae)
    run.save(
        vae, f"VAE in {cfg.output_dir}: reconstructions.png shows held-out slices and their reconstructions"
    )


def build(run: TrainingRun, cfg: TrainVAEConfig) -> SliceAutoencoder:
    """The autoencoder: from scratch, or the one to fine-tune."""
    if not cfg.init_from:
        shape = (cfg.image_size, cfg.latent_channels, cfg.widths, cfg.layers_per_block, cfg.mid_attention)
        return build_autoencoder(*shape, cfg.patch_size)
    vae = load_autoencoder(cfg.init_from, cfg.revision, cfg.variant)
    run.check_leakage(f"--init_from {cfg.init_from}", vae)
    run.depends_on(**{"weights of --init_from": vae})
    if cfg.decoder_only:
        latent_encoder(vae).requires_grad_(False)
    return vae


def validate(run: TrainingRun, cfg: TrainVAEConfig, vae: SliceAutoencoder, val: SliceTensors) -> None:
    """Log PSNR, SSIM and KL of held-out slices and save reconstructions. Every process calls it."""
    vae = run.full_weights(vae)
    count = len(val) if run.updates == cfg.max_steps else cfg.eval_images
    quality = measure(run, vae, val, evenly_spaced(len(val), count), cfg.batch_size)
    if run.is_main:
        save_reconstructions(vae, val, run.output_dir / "reconstructions.png", run.device)
    run.log(**quality)
    text = "step {}: held-out PSNR {val_psnr:.2f} dB, SSIM {val_ssim:.3f}"
    run.message(text.format(run.updates, **quality))


@torch.no_grad()
def measure(
    run: TrainingRun, vae: SliceAutoencoder, slices: SliceTensors, indices: list[int], batch_size: int
) -> dict[str, float]:
    """Mean PSNR (dB), SSIM and KL (nats per latent element) of slices decoded from the posterior's mean.

    Per slice, in float32; each process measures its share.
    """
    sums = torch.zeros(4, device=run.device)
    share = indices[run.accelerator.process_index :: run.accelerator.num_processes]
    for batch in DataLoader(Subset(slices, share), batch_size=batch_size):
        images = batch["image"].to(run.device)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.mean, return_dict=False)[0].clamp(-1, 1)
        pairs = (reconstruction, images)
        psnr = peak_signal_noise_ratio(*pairs, data_range=2.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(*pairs, data_range=2.0, reduction="none")
        kl = kl_divergence(posterior.mean, posterior.logvar) * len(images)
        sums += torch.stack([psnr.sum(), ssim.sum(), kl, torch.tensor(len(images), device=images.device)])
    psnr, ssim, kl, count = run.accelerator.reduce(sums, "sum").tolist()
    return {"val_psnr": psnr / count, "val_ssim": ssim / count, "val_kl": kl / count}


@torch.no_grad()
def measure_decoder_noise(
    vae: SliceAutoencoder, slices: SliceTensors, batch_size: int, device: torch.device
) -> None:
    """Set what a sampled decoder adds, from posterior samples of at most 512 held-out slices."""
    chosen = Subset(slices, evenly_spaced(len(slices), 512))
    generator, pairs = torch.Generator().manual_seed(0), []  # pairs of (B, 1, H, W)
    for batch in DataLoader(chosen, batch_size=batch_size):
        latents = vae.encode(batch["image"].to(device)).latent_dist.sample(generator)
        pairs.append((batch["image"], vae.decode(latents, return_dict=False)[0].cpu()))
    vae.set_decoder_noise(*(torch.cat(part) for part in zip(*pairs)))


@torch.no_grad()
def save_reconstructions(
    vae: SliceAutoencoder, slices: SliceTensors, path: Path, device: torch.device
) -> None:
    """Save ten held-out slices above their reconstructions."""
    images = torch.stack(
        [slices[index]["image"] for index in evenly_spaced(len(slices), 10)]
    )  # (10, 1, H, W)
    latents = vae.encode(images.to(device)).latent_dist.mean
    reconstruction = vae.decode(latents, return_dict=False)[0]
    rows = {"real": images, "reconstructed": reconstruction}
    save_rows(path, {title: (row / 2 + 0.5).clamp(0, 1) for title, row in rows.items()})


if __name__ == "__main__":
    run_recipe(main)
