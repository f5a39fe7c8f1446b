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
SAMPLERS = {  # scheduler, steps, guidance scale, η, guided part of the noise schedule; None: the model's own
    "DDIM, the model's default": ("ddim", None, None, None, (0.0, 1.0)),
    "DDIM 50": ("ddim", 50, GUIDANCE, 0.0, (0.0, 1.0)),
    "DPM-Solver++ 20": ("dpm++", 20, GUIDANCE, 0.0, (0.0, 1.0)),
    "DDIM 20": ("ddim", 20, GUIDANCE, 0.0, (0.0, 1.0)),
    "UniPC 20": ("unipc", 20, GUIDANCE, 0.0, (0.0, 1.0)),
    "DPM-Solver++ 10": ("dpm++", 10, GUIDANCE, 0.0, (0.0, 1.0)),
    "DPM-Solver++ 20, guided below 0.7": ("dpm++", 20, GUIDANCE, 0.0, (0.0, 0.7)),
    "DPM-Solver++ 20, no guidance": ("dpm++", 20, 1.0, 0.0, (0.0, 1.0)),
    "DPM-Solver++ 20, guidance 2.5": ("dpm++", 20, 2.5, 0.0, (0.0, 1.0)),
}
COLUMNS = ("sampler", "KID × 1000", "precision", "recall", "AD − NC, mm²", "64 samples, s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder with data/ and ldm/")
    parser.add_argument("--samples", type=int, default=256, help="slices of each row, half of them AD")
    parser.add_argument("--batch_size", type=int, default=64, help="slices generated at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()

    pipeline = load_pipeline(str(options.run / "ldm")).to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    metrics = HeldOutMetrics(options.run / "data", size, options.samples)
    rows = [("real training slices (reference)", *metrics.reference(), "–")]
    rows.append(("the same, reconstructed", *reconstructed(pipeline, metrics), "–"))
    for name, settings in SAMPLERS.items():
        rows.append((name, *row(pipeline, metrics, settings, options)))
        print(" | ".join(rows[-1]), flush=True)

    use_scheduler(pipeline, "ddim")
    lines = [
        f"{options.samples} slices per row against {len(metrics.held_out)} of held-out subjects; {size} px; "
        f"guidance scale {GUIDANCE} and η = 0 unless stated otherwise. The model's default is "
        f"{describe_sampling(pipeline)}. KID with its 95 % CI.",
        "",
        *table(COLUMNS, rows),
        "",
        f"- AD − NC is the difference of the mean area of the lateral ventricle, by segmentation: "
        f"{metrics.truth():.0f} mm² in held-out slices.",
        "- Target: KID of 20 steps of DPM-Solver++ no worse, within its interval, than of 50 of DDIM.",
        f"- {FEATURES}",
    ]
    report("samplers", "Samplers", lines, options.results)


@torch.no_grad()
def reconstructed(pipeline, metrics: HeldOutMetrics) -> tuple[str, ...]:
    """The cells of reconstructed training slices, which bound the quality of any denoiser."""
    others, vae = metrics.others, pipeline.vae
    parts = [vae.encode(part.to(DEVICE)).latent_dist.mean for part in others.floats().split(64)]
    images = torch.cat([vae.decode(part).sample.clamp(-1, 1).cpu() for part in parts])
    return metrics.cells(images, others.subjects, others.labels)


def row(pipeline, metrics: HeldOutMetrics, settings: tuple, options: argparse.Namespace) -> tuple[str, ...]:
    """The cells of one entry of SAMPLERS."""
    sampler, steps, guidance, eta, interval = settings
    use_scheduler(pipeline, sampler)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "eta": eta}
    call["guidance_interval"] = interval
    synchronize()
    started = time.perf_counter()
    count, precision = options.samples // 2, choose_precision(None)
    samples = generate_image_set(pipeline, count, 0, options.batch_size, precision=precision, **call)
    synchronize()
    seconds = (time.perf_counter() - started) * 64 / len(samples)
    return *metrics.cells(samples.floats(), samples.subjects, samples.labels), f"{seconds:.1f}"


if __name__ == "__main__":
    main()
