"""How good beside what, at equal wall-clock on one cohort: prints a table, and draws samples of each method.

    python benchmarks/peers.py [--seconds 420] [--data_dir runs/demo/data] [--quick]

Each method has the same seconds to train, half for its autoencoder and half for its diffusion; drawing and
measuring come on top. All compute in bfloat16 where the hardware does. Below stands what each method is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import (
    DEVICE,
    RESULTS,
    Preset,
    flags,
    make_cohort,
    report,
    results_path,
    run,
    run_watched,
    synchronize,
    table,
)

import numpy as np  # isort: skip
import pandas as pd
import torch
from peer_monai import train_monai
from peer_student import train_student
from peer_training import Trained
from yardstick import FEATURES, Yardstick

from adni_ldm.data.slices import evenly_spaced
from adni_ldm.figures import save_rows
from adni_ldm.generation import generate_images, image_seed
from adni_ldm.loading import load_pipeline
from adni_ldm.precision import choose_precision

CLASSES = ("AD", "NC")
METHODS = {
    "ours": "train_vae.py and train_ldm.py with the preset, the steps fitted to the time, which counts from "
    "the start of the command to the saved model. 50 DDIM steps, guidance 1.5.",
    "monai": "MONAI's AutoencoderKL, PatchDiscriminator and DiffusionModelUNet as its 2-D LDM tutorial "
    "(generation/2d_ldm) trains them: batch 64, RandAffine, L1 + 1e-6 KL + 0.01 adversarial after a "
    "tenth of the time, Adam 1e-4 and 5e-4, epsilon, linear betas, 1000 DDPM steps that clip to ±4 where "
    "it has ±1, for latents go beyond. Without its perceptual term, whose weights cannot be had offline. "
    "On a CPU its networks have our preset's widths: with its own it would take a few dozen steps. The "
    "class, which it lacks, enters by cross-attention.",
    "monai, our lr": "as monai, with our learning rates, batches and number of blocks, and no RandAffine: "
    "many more steps in the time.",
    "student": "our own writing of a published student project on these slices: a convolutional VAE with one "
    "vector of 128 numbers, a U-Net with BatchNorm on what the decoder makes of it, 10 steps of noise"
    " (betas up to 0.1), epsilon by squared error, sampled from draws of the VAE's prior. The sigmoid"
    " at its end, by which it could predict no negative noise, is left out.",
}
COLUMNS = ("method", "trained, s", "PSNR, dB", "KID × 1000", "precision", "recall", "AD − NC, mm²")
COLUMNS += ("64 samples, s",)


# ---- Ours ----------------------------------------------------------------------------------------------


def train_ours(work: Path, data: Path, preset: Preset, seconds: float) -> Trained:
    """Both recipes, each in a process of its own, with as many steps as the time allows."""
    steps, taken = {}, 0.0
    for recipe, name in (("train_vae", "vae"), ("train_ldm", "ldm")):
        settings = {"config": f"configs/{preset.name}/{name}.yaml", "data_dir": data, "report_to": "none"}
        settings |= {"checkpointing_steps": 0, "output_dir": work / name}
        settings |= {"vae": work / "vae", "validation_steps": 0} if recipe == "train_ldm" else {}
        warmup = getattr(preset, name)["warmup_steps"]
        # A short run tells how long a step takes and how long all the rest; it is not counted.
        trial = settings | {
            "max_steps": 40,
            "log_steps": 5,
            "warmup_steps": 1,
            "output_dir": work / f"{name}_trial",
        }
        started = time.perf_counter()
        speed = run_watched(work / "trial.json", recipe, trial)["steps_per_second"]
        rest = time.perf_counter() - started - 40 / speed
        steps[name] = max(10, int(0.97 * (seconds / 2 - rest) * speed))
        settings |= {"max_steps": steps[name], "warmup_steps": min(warmup, max(1, steps[name] // 20))}
        started = time.perf_counter()
        run([sys.executable, f"{recipe}.py", *flags(settings)])
        taken += time.perf_counter() - started

    pipeline = load_pipeline(str(work / "ldm")).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    precision, drawn = choose_precision(None), 0

    def sample(labels: torch.Tensor) -> torch.Tensor:
        nonlocal drawn
        seeds = [image_seed(0, drawn + index) for index in range(len(labels))]
        drawn += len(labels)
        return torch.cat(list(generate_images(pipeline, labels.tolist(), seeds, 64, precision))) * 2 - 1

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample

    return Trained(reconstruct, sample, taken, f"{steps['vae']} + {steps['ldm']} steps")


# ---- Judging -------------------------------------------------------------------------------------------


@torch.no_grad()
def judge(
    name: str, trained: Trained, yardstick: Yardstick, count: int
) -> tuple[tuple[str, ...], torch.Tensor]:
    """A row of the table, and the samples (2, count / 2, 1, H, W) of AD and NC."""
    images = yardstick.held_out.floats()
    reconstructed = torch.cat([trained.reconstruct(part.to(DEVICE)).cpu() for part in images.split(64)])
    squared = (reconstructed.float().clamp(-1, 1) - images).square().mean(dim=(1, 2, 3))
    psnr = (10 * torch.log10(4 / squared.clamp(min=1e-10))).mean().item()  # of a range of 2
    labels, parts, seconds = torch.arange(count) % 2, [], []
    for part in labels.split(64):
        synchronize()
        started = time.perf_counter()
        parts.append(trained.sample(part).clamp(-1, 1))
        synchronize()
        seconds.append((time.perf_counter() - started) * 64 / len(part))
    drawn = torch.cat(parts)
    row = (name, f"{trained.seconds:.0f} ({trained.note})", f"{psnr:.1f}")
    row += yardstick.cells(drawn, np.arange(count), labels.numpy())
    return (*row, f"{statistics.median(seconds):.1f}"), torch.stack([drawn[0::2], drawn[1::2]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="of training, for each method")
    parser.add_argument(
        "--quick", action="store_true", help="a try: 20 seconds and 64 samples of each method"
    )
    parser.add_argument(
        "--samples", type=int, default=256, help="slices drawn of each method, half of them AD"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--data_dir", type=Path, help="phantom cohort; default: the demo's, or of ADNI size, is made"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder that page and picture are written to"
    )
    options = parser.parse_args()
    seconds, count, steps = (20, 64, 50) if options.quick else (options.seconds, options.samples, 1000)
    preset = Preset.load("adni" if DEVICE.type == "cuda" else "demo")

    with tempfile.TemporaryDirectory(prefix="adni_ldm_peers_") as folder:
        work = Path(folder)
        subjects, slices = (1526, 20) if preset.name == "adni" else (200, 10)
        data = options.data_dir or make_cohort(work / "data", subjects, slices, preset.image_size)
        truth = pd.read_csv(data / "test/metadata.csv")
        yardstick = Yardstick(data, preset.image_size, count)
        train, held_out = yardstick.train, yardstick.held_out
        rows = [("other real slices", "–", "–", *yardstick.reference(), "–")]
        pictures = {f"real, {name}": some(held_out.of_class(name).floats()) for name in CLASSES}
        for name in options.methods:
            print(f"{name}: training for {seconds:.0f} s", flush=True)
            torch.manual_seed(0)
            if name == "ours":
                trained = train_ours(work, Path(data).resolve(), preset, seconds)
            elif name == "student":
                trained = train_student(train, seconds)
            else:
                trained = train_monai(train, seconds, preset, tutorial=name == "monai", sampling_steps=steps)
            row, drawn = judge(name, trained, yardstick, count)
            rows.append(row)
            pictures |= {f"{name}, {label}": some(part) for label, part in zip(CLASSES, drawn)}
            print(" | ".join(row), flush=True)

    areas = [truth.ventricle_mm2[truth.label == name].mean() for name in CLASSES]
    lines = [
        f"{seconds:.0f} s of training for each; {len(train)} slices to train on, {len(held_out)} of other "
        f"subjects to compare with, {count} drawn, of {preset.image_size} px. KID with its 95 % interval.",
        "",
        *table(COLUMNS, rows),
        "",
        f"- AD − NC is the difference of the mean area of the lateral ventricle, measured in the pictures. "
        f"Held-out slices show {yardstick.truth():.0f} mm², in truth {areas[0] - areas[1]:.0f} mm².",
        f"- The row of other real slices is what {count} of the training slices reach in the samples' place.",
        # what "monai" is explains "monai, our lr" as well
        *(f"- {name}: {text}" for name, text in METHODS.items() if name in " ".join(options.methods)),
        f"- {FEATURES}",
    ]
    report("peers", "Ours and its peers, in the same time", lines, options.results)
    picture = results_path("peers", options.results).with_suffix(".png")
    save_rows(picture, {title: (row / 2 + 0.5).clamp(0, 1) for title, row in pictures.items()})
    print(f"samples: {picture}")


def some(images: torch.Tensor, count: int = 10) -> torch.Tensor:
    """Evenly chosen ones."""
    return images[evenly_spaced(len(images), count)]


if __name__ == "__main__":
    main()
