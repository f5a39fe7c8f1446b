"""Sample quality of several methods after equal training time on one cohort: a table and a figure of samples.

    python benchmarks/baselines.py [--seconds 420] [--seeds 0 1 2] [--data_dir runs/demo/data] [--quick]

Each method trains for the same time, half of it for its autoencoder and half for its diffusion model.
Sampling and evaluation are not included. All compute in bfloat16 where the hardware supports it. METHODS
defines each.
"""

from __future__ import annotations

import argparse
import itertools
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
    run_profiled,
    synchronize,
    table,
)

import numpy as np  # isort: skip
import pandas as pd
import torch
from baseline_monai import train_monai
from baseline_small import train_small
from baseline_training import Trained
from held_out import FEATURES, HeldOutMetrics

from adni_ldm.data.slices import evenly_spaced
from adni_ldm.figures import save_rows
from adni_ldm.generation import generate_images, image_seed
from adni_ldm.loading import load_pipeline
from adni_ldm.precision import choose_precision

CLASSES = ("AD", "NC")
METHODS = {
    "ours": "train_vae.py and train_ldm.py with the preset and as many steps as the time allows, measured "
    "from the start of the command to the saved model. Sampled with the model's own settings.",
    "monai": "MONAI's AutoencoderKL, PatchDiscriminator and DiffusionModelUNet as its 2-D LDM tutorial "
    "(generation/2d_ldm) trains them: batch size 64, RandAffine, L1 + 1e-6 KL + 0.01 adversarial loss after "
    "a tenth of the time, Adam 1e-4 and 5e-4, epsilon, linear betas, 1000 DDPM steps with clipping at ±4 "
    "instead of ±1, which latents exceed. Without its perceptual loss, whose weights are not available "
    "offline. On a CPU its networks have our preset's widths, and a level more where ours sees patches: with "
    "its own it would complete a few dozen steps. The class, which the tutorial lacks, is conditioned on by "
    "cross-attention.",
    "monai, our lr": "as monai, with our learning rates (those of AdamW, 1e-3, where our preset has Muon), "
    "batch sizes and number of blocks, without RandAffine: many more steps in the same time.",
    "small baseline": "our reimplementation of a published student project on these slices: a convolutional "
    "VAE with one vector of 128 numbers, a U-Net with BatchNorm on the decoder's first feature map, 10 "
    "diffusion steps (betas up to 0.1), epsilon prediction by squared error, sampling from the VAE's prior. "
    "Its final sigmoid, with which negative noise cannot be predicted, is omitted.",
}
COLUMNS = ("method", "trained, s", "PSNR, dB", "KID × 1000", "precision", "recall", "AD − NC, mm²")
COLUMNS += ("64 samples, s",)


# ---- Ours ----------------------------------------------------------------------------------------------


def train_ours(work: Path, data: Path, preset: Preset, seconds: float, seed: int) -> Trained:
    """Run both recipes, each in its own process, with as many steps as the time allows."""
    steps, taken = {}, 0.0
    for recipe, name in (("train_vae", "vae"), ("train_ldm", "ldm")):
        settings = {"config": f"configs/{preset.name}/{name}.yaml", "data_dir": data, "report_to": "none"}
        settings |= {"checkpointing_steps": 0, "output_dir": work / name, "seed": seed}
        settings |= {"vae": work / "vae", "validation_steps": 0} if recipe == "train_ldm" else {}
        warmup = getattr(preset, name)["warmup_steps"]
        # A short run measures the time of a step and of everything else; it is not counted.
        trial = settings | {
            "max_steps": 40,
            "log_steps": 5,
            "warmup_steps": 1,
            "output_dir": work / f"{name}_trial",
        }
        started = time.perf_counter()
        speed = run_profiled(work / "trial.json", recipe, trial)["steps_per_second"]
        rest = time.perf_counter() - started - 40 / speed
        steps[name] = max(10, int(0.97 * (seconds / 2 - rest) * speed))
        settings |= {"max_steps": steps[name], "warmup_steps": min(warmup, max(1, steps[name] // 20))}
        started = time.perf_counter()
        run([sys.executable, f"{recipe}.py", *flags(settings)])
        taken += time.perf_counter() - started

    pipeline = load_pipeline(str(work / "ldm")).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    precision, generated = choose_precision(None), 0

    def sample(labels: torch.Tensor) -> torch.Tensor:
        nonlocal generated
        seeds = [image_seed(seed, generated + index) for index in range(len(labels))]
        generated += len(labels)
        return torch.cat(list(generate_images(pipeline, labels.tolist(), seeds, 64, precision))) * 2 - 1

    def reconstruct(images: torch.Tensor) -> torch.Tensor:
        return pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample

    return Trained(reconstruct, sample, taken, f"{steps['vae']} + {steps['ldm']} steps")


# ---- Evaluation ----------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    name: str, trained: Trained, metrics: HeldOutMetrics, count: int
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return a row of the table, and the samples (2, count / 2, 1, H, W) of AD and NC."""
    images = metrics.held_out.floats()
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
    samples = torch.cat(parts)
    row = (name, f"{trained.seconds:.0f} ({trained.note})", f"{psnr:.1f}")
    row += metrics.cells(samples, np.arange(count), labels.numpy())
    return (*row, f"{statistics.median(seconds):.1f}"), torch.stack([samples[0::2], samples[1::2]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=420, help="of training, for each method")
    parser.add_argument(
        "--quick", action="store_true", help="a trial: 20 seconds and 64 samples of each method"
    )
    parser.add_argument("--samples", type=int, default=256, help="samples of each method, half of them AD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each method is trained with each")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--data_dir",
        type=Path,
        help="phantom cohort; default: one of the demo's size, or of ADNI's on a GPU, is made",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder that page and figure are written to"
    )
    options = parser.parse_args()
    seconds, count, steps = (20, 64, 50) if options.quick else (options.seconds, options.samples, 1000)
    preset = Preset.load("adni" if DEVICE.type == "cuda" else "demo")

    with tempfile.TemporaryDirectory(prefix="adni_ldm_baselines_") as folder:
        work = Path(folder)
        subjects, slices = (1526, 20) if preset.name == "adni" else (200, 10)
        data = options.data_dir or make_cohort(work / "data", subjects, slices, preset.image_size)
        truth = pd.read_csv(data / "test/metadata.csv")
        metrics = HeldOutMetrics(data, preset.image_size, count)
        train, held_out = metrics.train, metrics.held_out
        rows = [("real training slices (reference)", "–", "–", *metrics.reference(), "–")]
        figure = {f"real, {name}": some(held_out.of_class(name).floats()) for name in CLASSES}
        for name, seed in itertools.product(options.methods, options.seeds):
            print(f"{name}, seed {seed}: training for {seconds:.0f} s", flush=True)
            torch.manual_seed(seed)
            if name == "ours":
                (work / str(seed)).mkdir()
                trained = train_ours(work / str(seed), Path(data).resolve(), preset, seconds, seed)
            elif name == "small baseline":
                trained = train_small(train, seconds)
            else:
                trained = train_monai(train, seconds, preset, tutorial=name == "monai", sampling_steps=steps)
            title = name if len(options.seeds) == 1 else f"{name}, seed {seed}"
            row, samples = evaluate(title, trained, metrics, count)
            rows.append(row)
            print(" | ".join(row), flush=True)
            if seed == options.seeds[0]:
                figure |= {f"{name}, {label}": some(part) for label, part in zip(CLASSES, samples)}

    areas = [truth.ventricle_mm2[truth.label == name].mean() for name in CLASSES]
    lines = [
        f"{seconds:.0f} s of training of each method on {len(train)} slices; {count} samples of each against "
        f"{len(held_out)} slices of held-out subjects; {preset.image_size} px. KID with its 95 % CI.",
        "",
        *table(COLUMNS, rows),
        "",
        "- AD − NC is the difference of the mean area of the lateral ventricle, by segmentation. In "
        f"held-out slices it is {metrics.truth():.0f} mm², and {areas[0] - areas[1]:.0f} mm² in truth.",
        f"- The reference is {count} of the training slices in the samples' place.",
        # the definition of "monai" is needed for "monai, our lr" as well
        *(f"- {name}: {text}" for name, text in METHODS.items() if name in " ".join(options.methods)),
        f"- {FEATURES}",
    ]
    report("baselines", "Sample quality after equal training time", lines, options.results)
    path = results_path("baselines", options.results).with_suffix(".png")
    save_rows(path, {title: (row / 2 + 0.5).clamp(0, 1) for title, row in figure.items()})
    print(f"samples: {path}")


def some(images: torch.Tensor, count: int = 10) -> torch.Tensor:
    """Select evenly spaced images."""
    return images[evenly_spaced(len(images), count)]


if __name__ == "__main__":
    main()
