"""The reference loop of throughput.py: a latent diffusion step as in a typical example script.

Every step reads and scales its slices, encodes them with the VAE, and calls the U-Net, in float32 unless
--autocast is given. AdamW, gradient clipping and EMA are the libraries' defaults, and the loss is read after
each step. Networks, batch size and data are those of train_ldm.py.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402
from diffusers.training_utils import EMAModel  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torchvision import transforms  # noqa: E402

from adni_ldm.data.slices import load_slices  # noqa: E402
from adni_ldm.loading import load_autoencoder  # noqa: E402
from adni_ldm.models import ClassEmbedding, ConditionalDenoiser, build_denoiser  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="file that speed and memory are written to")
    for name in ("data_dir", "vae"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("image_size", "batch_size", "max_steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--unet_widths", type=int, nargs="+", required=True)
    parser.add_argument("--layers_per_block", type=int, default=2)
    parser.add_argument("--attention_levels", type=int)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 by autocast")
    cfg = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    transform = transforms.Compose(
        [transforms.Resize(cfg.image_size), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    )
    dataset = load_slices(cfg.data_dir)["train"].select_columns(["image", "label"])
    dataset = dataset.with_transform(
        lambda rows: {
            "image": [transform(image.convert("L")) for image in rows["image"]],
            "label": rows["label"],
        }
    )
    workers = 4 if device.type == "cuda" else 0
    loader = DataLoader(dataset, cfg.batch_size, shuffle=True, num_workers=workers, drop_last=True)

    vae = load_autoencoder(cfg.vae).to(device).requires_grad_(False)
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 1, cfg.image_size, cfg.image_size, device=device)).latent_dist
    shape = {"layers_per_block": cfg.layers_per_block, "attention_levels": cfg.attention_levels}
    unet = build_denoiser(*latents.mean.shape[1:3], cfg.unet_widths, **shape)
    model = ConditionalDenoiser(unet, ClassEmbedding()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cfg.max_steps)
    ema = EMAModel(model.parameters(), decay=0.9999)
    noise_scheduler = DDPMScheduler(1000, beta_schedule="scaled_linear", prediction_type="v_prediction")

    stamps = []
    while len(stamps) < cfg.max_steps:
        for batch in loader:
            images, labels = batch["image"].to(device), batch["label"].to(device)
            with torch.autocast(device.type, torch.bfloat16) if cfg.autocast else nullcontext():
                with torch.no_grad():
                    latents = vae.encode(images).latent_dist.sample() * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(1000, (len(latents),), device=device)
                noisy = noise_scheduler.add_noise(latents, noise, timesteps)
                prediction = model(noisy, timesteps, labels)
                target = noise_scheduler.get_velocity(latents, noise, timesteps)
                loss = F.mse_loss(prediction.float(), target.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(model.parameters())
            loss.item()
            stamps.append(time.perf_counter())
            if len(stamps) == cfg.max_steps:
                break

    warm = stamps[len(stamps) // 3 :]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result = {"steps_per_second": (len(warm) - 1) / (warm[-1] - warm[0]), "GiB": peak}
    cfg.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
