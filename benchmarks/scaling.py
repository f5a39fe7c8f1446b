"""Time and memory against the number of images, their size, and the number of processes: three tables.

    python benchmarks/scaling.py [--subjects 12] [--factors 1 4 16] [--steps 40]

Recipes run unchanged. Their private memory (RssAnon) must not grow with the number of images; mapped files,
such as slices and latents, can be reclaimed by the system. The networks are small, so that everything else
shows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import DEVICE, RESULTS, Preset, make_cohort, report, run_profiled, table

import torch  # isort: skip
from diffusers import DDIMScheduler

from adni_ldm.pipeline import ClassConditionalLDMPipeline

SLICES = 10  # of a subject


class Bench:
    """Runs recipes in a folder."""

    def __init__(self, work: Path, options: argparse.Namespace):
        self.work, self.options, self.number = work, options, 0

    def path(self, name: str) -> Path:
        self.number += 1
        return self.work / f"{name}{self.number}"

    def train(
        self, recipe: str, data: Path, preset: Preset, launcher: Sequence[str] = (), batch_size: int = 16
    ) -> dict[str, float]:
        """The result of profile_recipe.py for a training run."""
        steps = self.options.steps
        settings = {"data_dir": data, "image_size": preset.image_size, "batch_size": batch_size}
        settings |= {"output_dir": self.path("run"), "max_steps": steps, "log_steps": max(1, steps // 15)}
        settings |= {"checkpointing_steps": 0, "report_to": "none"}
        if recipe == "train_ldm":
            vae = self.path("vae")
            preset.build_vae().save_pretrained(vae)
            settings |= preset.ldm_shape | {"vae": vae, "validation_steps": 0}
        else:
            settings |= preset.vae_shape | {"eval_images": 1}
        return run_profiled(self.path("out"), recipe, settings, launcher)

    # ---- Tables --------------------------------------------------------------------------------------------

    def images(self, preset: Preset) -> list[str]:
        """Training on latents, and sampling to disk, with increasing numbers of images."""
        rows, first = [], None
        for factor in self.options.factors:
            subjects = self.options.subjects * factor
            data = make_cohort(self.path("data"), subjects, SLICES, preset.image_size)
            count = subjects * SLICES
            found = self.train("train_ldm", data, preset)
            sampling = self.sample(preset, count // 2)
            first = first or (found, sampling)
            growth = [
                1024 * (one["own_GiB"] - base["own_GiB"]) for one, base in zip((found, sampling), first)
            ]
            rest = found["seconds"] - self.options.steps / found["steps_per_second"]
            rows.append(
                (
                    f"{count} (×{factor})",
                    f"{found['steps_per_second'] * 16:.0f}",
                    f"{rest:.1f}",
                    f"{1024 * found['own_GiB']:.0f} ({growth[0]:+.0f})",
                    f"{count / sampling['seconds']:.1f}",
                    f"{1024 * sampling['own_GiB']:.0f} ({growth[1]:+.0f})",
                )
            )
            print(" | ".join(rows[-1]), flush=True)
        header = ("images", "LDM step, images/s", "other than steps, s", "private memory, MiB")
        return table((*header, "sampling, images/s", "private memory, MiB"), rows)

    def sample(self, preset: Preset, per_class: int) -> dict[str, float]:
        """Run sample.py with two steps, so that everything but the network shows."""
        model, denoiser = self.path("model"), preset.build_denoiser()
        scheduler = DDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        )
        parts = (preset.build_vae(), denoiser.unet, denoiser.class_embedding, scheduler)
        ClassConditionalLDMPipeline(*parts).save_pretrained(model)
        settings = {"model": model, "output_dir": self.path("samples"), "num_images": per_class}
        settings |= {"num_inference_steps": 2}
        return run_profiled(self.path("out"), "sample", settings)

    def sizes(self, subjects: int) -> list[str]:
        """Both training steps with slices, and latents, of increasing size."""
        rows = []
        for side in self.options.sizes:
            preset = small_preset(side)
            data = make_cohort(self.path("data"), subjects, SLICES, side)
            batch = 8
            vae, ldm = (
                self.train(name, data, preset, batch_size=batch) for name in ("train_vae", "train_ldm")
            )
            speeds = [one["steps_per_second"] * batch for one in (vae, ldm)]
            rows.append((f"{side} × {side}", *(f"{one:.1f}" for one in speeds), f"{ldm['GiB']:.2f}"))
            print(" | ".join(rows[-1]), flush=True)
        return table(("slices", "VAE step, images/s", "LDM step, images/s", "peak GiB"), rows)

    def processes(self, preset: Preset, subjects: int) -> list[str]:
        """One batch on one process, and distributed over two or over all GPUs."""
        rows, single = [], None
        data = make_cohort(self.path("data"), subjects, SLICES, preset.image_size)
        most = torch.cuda.device_count() if DEVICE.type == "cuda" else 2
        for count in sorted({1, most}):
            config = "configs/accelerate/" + ("bf16.yaml" if DEVICE.type == "cuda" else "cpu.yaml")
            launcher = ("-m", "accelerate.commands.launch", "--config_file", config)
            launcher += ("--num_processes", str(count), "--mixed_precision", "bf16")
            found = self.train(
                "train_ldm", data, preset, launcher if count > 1 else (), batch_size=16 // count
            )
            speed = found["steps_per_second"] * (16 // count) * count
            single = single or speed
            rows.append(
                (str(count), f"{speed:.1f}", f"{speed / single:.2f}", f"{1024 * found['own_GiB']:.0f}")
            )
            print(" | ".join(rows[-1]), flush=True)
        return table(
            ("processes", "LDM step, images/s", "relative to one", "private memory of the first, MiB"), rows
        )


def small_preset(image_size: int) -> Preset:
    """Networks small enough that everything else takes most of the time."""
    vae = {"widths": [16, 32, 64], "latent_channels": 4}
    return Preset("small", image_size, vae, {"unet_widths": [32, 64], "layers_per_block": 1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subjects", type=int, default=12, help="of the smallest cohort, ten slices each")
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 4, 16])
    sides = [64, 128, 256] if DEVICE.type == "cuda" else [32, 64, 128]
    parser.add_argument("--sizes", type=int, nargs="+", default=sides, help="sides of the slices, pixels")
    parser.add_argument("--steps", type=int, default=40, help="of a training run")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adni_ldm_scaling_") as folder:
        bench, preset = Bench(Path(folder), options), small_preset(options.sizes[0])
        lines = ["## Number of images", "", *bench.images(preset)]
        lines += ["", "## Size of the images", "", *bench.sizes(4 * options.subjects)]
        lines += ["", "## Processes on one machine", "", *bench.processes(preset, options.subjects)]
    lines += [
        "",
        "Private memory excludes mapped files; in brackets, the increase over the fewest images, MiB.",
    ]
    report("scaling", "Scaling", lines, options.results)


if __name__ == "__main__":
    main()
