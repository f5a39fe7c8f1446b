"""From slices to a saved pipeline at the size of ADNI, by the presets of configs/adni: a table and a figure.

    python benchmarks/end_to_end.py [--subjects 1526] [--vae_steps N] [--ldm_steps N]

Both recipes train on a phantom cohort of 1,526 subjects with 20 slices of 256 x 256 (30,520 slices, as the
preprocessed ADNI set), timed from the start to the end of each command. Reconstructions of held-out slices
are then compared with the slices, and with the same slices before the simulated scanner noise was added.

On a CPU the run is shorter and the cohort smaller.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

from measure import DEVICE, RESULTS, Preset, flags, make_cohort, report, results_path, run, synchronize, table

import torch  # isort: skip
from diffusers import AutoencoderKL
from phantoms import read_test_set, render_again
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from adni_ldm.figures import save_rows
from adni_ldm.generation import describe_sampling, generate_images, image_seed
from adni_ldm.loading import load_pipeline
from adni_ldm.precision import choose_precision
from adni_ldm.preprocessing.phantom import Subject

STAGES = ("stage", "steps", "images a step", "seconds")
RECONSTRUCTION = ("image", "compared with", "PSNR, dB", "SSIM")
SHORT = DEVICE.type == "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subjects", type=int, default=30 if SHORT else 1526, help="of the cohort")
    parser.add_argument("--slices", type=int, default=20, help="of a subject")
    parser.add_argument("--vae_steps", type=int, default=300 if SHORT else None, help="default: the preset's")
    parser.add_argument("--ldm_steps", type=int, default=40 if SHORT else None, help="default: the preset's")
    parser.add_argument("--latent_channels", type=int, help="default: the preset's")
    parser.add_argument("--batch_size", type=int, default=2 if SHORT else None, help="default: the presets'")
    parser.add_argument("--compared", type=int, default=60 if SHORT else 1000, help="held-out slices at most")
    parser.add_argument("--samples", type=int, default=4 if SHORT else 64, help="samples")
    parser.add_argument("--preset", default="adni", help="folder of configs/")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder that page and figure are written to"
    )
    options = parser.parse_args()
    preset = Preset.load(options.preset)

    with tempfile.TemporaryDirectory(prefix="adni_ldm_end_to_end_") as folder:
        work = Path(folder)
        data = make_cohort(work / "data", options.subjects, options.slices, preset.image_size)
        common = {"data_dir": data, "report_to": "none", "checkpointing_steps": 0}
        wanted = {"latent_channels": options.latent_channels} if options.latent_channels else {}
        vae = shortened(preset.vae, options.vae_steps, options.batch_size) | wanted
        ldm = shortened(preset.ldm, options.ldm_steps, options.batch_size) | {"vae": work / "vae"}
        rows = [train("train_vae", f"configs/{preset.name}/vae.yaml", common, vae, work / "vae")]
        rows.append(train("train_ldm", f"configs/{preset.name}/ldm.yaml", common, ldm, work / "ldm"))
        compared, quality, figure = compare(data, work / "ldm/vae", options.compared)
        samples, sampling, how = generate(work / "ldm", options.samples)

    channels = options.latent_channels or preset.vae["latent_channels"]
    rows.append(("both", "", "", sum(row[-1] for row in rows)))
    lines = [
        f"{options.subjects} subjects of {options.slices} slices of {preset.image_size} px, {channels} "
        f"latent channels. {options.samples} samples in {sampling:.1f} s: {how}.",
        "",
        *table(STAGES, [(*row, f"{seconds:.0f}") for *row, seconds in rows]),
        "",
        *table(RECONSTRUCTION, quality),
        "",
        f"- Means over {compared} slices of held-out subjects. Reconstructions are decoded from the "
        "posterior's mean. Noise-free slices are the output of a perfect denoiser.",
        "- Targets, on one H200: both at most 1,200 s; PSNR at least 39 dB, SSIM 0.977; 64 samples in 2 s.",
    ]
    report("end_to_end", "From slices to a saved pipeline", lines, options.results)
    path = results_path("end_to_end", options.results).with_suffix(".png")
    save_rows(path, figure | {"samples": samples[: len(next(iter(figure.values())))]})
    print(f"reconstructions and samples: {path}")


def shortened(preset: dict, steps: int | None, batch_size: int | None) -> dict:
    """Scale a preset's schedule to fewer steps and a smaller batch size: each part keeps its fraction."""
    batch_size = batch_size or preset["batch_size"]
    if not steps:
        return {"max_steps": preset["max_steps"], "batch_size": batch_size}
    share = steps / preset["max_steps"]
    settings = {"max_steps": steps, "batch_size": batch_size}
    for name in ("warmup_steps", "discriminator_start"):
        if name in preset:
            settings[name] = max(1, round(preset[name] * share))
    if halflife := preset.get("ema_halflife_images"):
        settings["ema_halflife_images"] = max(1, round(halflife * share * batch_size / preset["batch_size"]))
    return settings | ({"validation_steps": 0} if "validation_steps" in preset else {})


def train(recipe: str, config: str, common: dict, settings: dict, out: Path) -> tuple:
    """Run a recipe and return its row."""
    words = flags({"config": config} | common | settings | {"output_dir": out})
    started = time.perf_counter()
    run([sys.executable, f"{recipe}.py", *words])
    seconds = time.perf_counter() - started
    print(f"{recipe}: {seconds:.0f} s", flush=True)
    return f"{recipe}.py", settings["max_steps"], settings["batch_size"], seconds


@torch.no_grad()
def compare(data: Path, folder: Path, count: int) -> tuple[int, list[tuple], dict[str, torch.Tensor]]:
    """Return the number of held-out slices, the rows of the table, and images (n, 1, H, W) for the figure."""
    vae = AutoencoderKL.from_pretrained(folder).to(DEVICE)
    slices, given = read_test_set(data)
    chosen = torch.linspace(0, len(given) - 1, min(count, len(given))).long()
    given = given[chosen]
    clean = render_again(data, slices.iloc[chosen.tolist()], without_noise)
    parts = []
    for part in tqdm(given.split(8), desc="reconstructing", file=sys.stderr):
        latents = vae.encode(part.to(DEVICE)).latent_dist.mean
        parts.append(vae.decode(latents).sample.clamp(-1, 1).cpu())
    reconstructed = torch.cat(parts)
    rows = []
    for title, pair in {
        ("reconstruction", "slice"): (reconstructed, given),
        ("noise-free slice", "slice"): (clean, given),
        ("reconstruction", "noise-free slice"): (reconstructed, clean),
    }.items():
        psnr = peak_signal_noise_ratio(*pair, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(*pair, data_range=2.0)
        rows.append((*title, f"{psnr:.2f}", f"{ssim:.4f}"))
    shown = torch.linspace(0, len(given) - 1, min(5, len(given))).long()
    figure = {"slice": given, "reconstruction": reconstructed, "noise-free": clean}
    return len(given), rows, {title: images[shown] / 2 + 0.5 for title, images in figure.items()}


def without_noise(subject: Subject, _: str) -> Subject:
    return dataclasses.replace(subject, noise=0.0)


def generate(model: Path, count: int) -> tuple[torch.Tensor, float, str]:
    """Generate slices of AD and NC in turn, as the model does by default.

    Returns them, the seconds (on a GPU after a warm-up), and the sampling settings.
    """
    pipeline, precision = load_pipeline(str(model)).to(DEVICE), choose_precision(None)
    pipeline.set_progress_bar_config(disable=True)
    labels, seeds = [index % 2 for index in range(count)], [image_seed(0, index) for index in range(count)]
    if DEVICE.type == "cuda":
        list(generate_images(pipeline, labels, seeds, count, precision))
    synchronize()
    started = time.perf_counter()
    samples = torch.cat(list(generate_images(pipeline, labels, seeds, count, precision)))
    synchronize()
    return samples, time.perf_counter() - started, describe_sampling(pipeline)


if __name__ == "__main__":
    main()
