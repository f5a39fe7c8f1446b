"""Sample quality and speed of the demo's model by scheduler, number of steps and guidance: a table.

    python benchmarks/samplers.py [--run runs/demo] [--samples 256]

Every row starts from the same noise, so that rows differ by the sampler only. KID, precision and recall are
against held-out slices. The first row is the reference, training slices of the cohort; the second is the same
slices reconstructed by the autoencoder, which bounds the quality of any denoiser.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from measure import DEVICE, RESULTS, report, synchronize, table

import torch  # isort: skip
from held_out import FEATURES, HeldOutMetrics

from adni_ldm.evaluation.image_sets import generate_image_set
from adni_ldm.generation import describe_sampling, use_scheduler
from adni_ldm.loading import load_pipeline
from adni_ldm.precision import choose_precision

GUIDANCE = 1.5
OLD = {"guidance_scale": GUIDANCE, "eta": 0.0}
SAMPLERS = {  # scheduler, and arguments of the pipeline; what is not given is the model's own
    "DDIM, the model's default": ("ddim", {}),
    "the default, decoder's mean": ("ddim", {"decoder_noise": False}),
    "DDIM 50, η = 0, decoder's mean": ("ddim", {"eta": 0.0, "decoder_noise": False}),
    "DDIM 50, η = 0, guidance 1.5, decoder's mean": ("ddim", {**OLD, "decoder_noise": False}),
    "DDIM 25": ("ddim", {"num_inference_steps": 25}),
    "DDIM 100": ("ddim", {"num_inference_steps": 100}),
    "DDPM 100": ("ddpm", {"num_inference_steps": 100}),
    "DPM-Solver++ 20": ("dpm++", {"num_inference_steps": 20}),
    "DPM-Solver++ SDE 20": ("dpm++_sde", {"num_inference_steps": 20}),
    "UniPC 20": ("unipc", {"num_inference_steps": 20}),
    "DDIM 50, guidance 1.5": ("ddim", {"guidance_scale": GUIDANCE}),
    "DDIM 50, guidance 2.5 below 0.7": ("ddim", {"guidance_scale": 2.5, "guidance_interval": (0.0, 0.7)}),
}
COLUMNS = ("sampler", "KID × 1000", "precision", "recall", "AD − NC, mm²", "SD of ventricle", "SD of brain")
COLUMNS += ("SD of intensity", "d", "power", "64 samples, s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder with data/ and ldm/")
    parser.add_argument("--samples", type=int, default=256, help="slices of each row, half of them AD")
    parser.add_argument("--batch_size", type=int, default=64, help="slices generated at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    parser.add_argument("--fresh", type=Path, help="a prepared cohort to compare with, for the test split")
    options = parser.parse_args()

    pipeline = load_pipeline(str(options.run / "ldm")).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    metrics = HeldOutMetrics(options.run / "data", size, options.samples, options.fresh)
    spread = metrics.spread(metrics.others.floats(), metrics.others.labels)
    rows = [("real training slices (reference)", *metrics.reference(), *spread, "–")]
    rows.append(("the same, reconstructed", *reconstructed(pipeline, metrics), "–"))
    for name, settings in SAMPLERS.items():
        rows.append((name, *row(pipeline, metrics, settings, options)))
        print(" | ".join(rows[-1]), flush=True)

    use_scheduler(pipeline, "ddim")
    lines = [
        f"{options.samples} slices per row against {len(metrics.held_out)} of held-out subjects; {size} px; "
        f"settings that a row does not name are the model's, {describe_sampling(pipeline)}. KID with its 95 "
        "% CI. SD within the classes AD, NC, Cohen's d of the ventricle, and power from 0.15 to 0.35, from "
        "0.35 to 0.6 and above 0.6 of Nyquist's frequency: of the row ÷ of the held-out slices.",
        "",
        *table(COLUMNS, rows),
        "",
        f"- AD − NC is the difference of the mean area of the lateral ventricle, by segmentation: "
        f"{metrics.truth():.0f} mm² in held-out slices.",
        f"- {FEATURES}",
    ]
    report("samplers", "Samplers", lines, options.results)


@torch.no_grad()
def reconstructed(pipeline, metrics: HeldOutMetrics) -> tuple[str, ...]:
    """The cells of reconstructed training slices, which bound the quality of any denoiser."""
    others, vae = metrics.others, pipeline.vae
    parts = [vae.encode(part.to(DEVICE)).latent_dist.mean for part in others.floats().split(64)]
    images = torch.cat([vae.decode(part).sample.clamp(-1, 1).cpu() for part in parts])
    cells = metrics.cells(images, others.subjects, others.labels)
    return *cells, *metrics.spread(images, others.labels)


def row(pipeline, metrics: HeldOutMetrics, settings: tuple, options: argparse.Namespace) -> tuple[str, ...]:
    """The cells of one entry of SAMPLERS."""
    sampler, call = settings
    use_scheduler(pipeline, sampler)
    synchronize()
    started = time.perf_counter()
    count, precision = options.samples // 2, choose_precision(None)
    samples = generate_image_set(pipeline, count, 0, options.batch_size, precision=precision, **call)
    synchronize()
    seconds = (time.perf_counter() - started) * 64 / len(samples)
    images = samples.floats()
    cells = metrics.cells(images, samples.subjects, samples.labels)
    return *cells, *metrics.spread(images, samples.labels), f"{seconds:.1f}"


if __name__ == "__main__":
    main()
