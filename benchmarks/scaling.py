"""How cost grows with the number of images, their size, and processes; prints three tables.

    python benchmarks/scaling.py [--subjects 12] [--factors 1 4 16] [--steps 40]

Recipes run as they are. Memory of their own (RssAnon) is what must not grow with the number of images; mapped
files, such as the slices and the latents, are the system's to take back. The networks are small, so that what
is not the network shows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from measure import DEVICE, RESULTS, Preset, make_cohort, report, run_watched, table

import torch  # isort: skip
from diffusers import DDIMScheduler

from adni_ldm.pipeline import ClassConditionalLDMPipeline

SLICES = 10  # of a subject


class Bench:
    """Folder, options, and how a recipe is run in it."""

    def __init__(self, work: Path, options: argparse.Namespace):
        self.work, self.options, self.number = work, options, 0

    def path(self, name: str) -> Path:
        self.number += 1
        return self.work / f"{name}{self.number}"

    def train(
        self, recipe: str, data: Path, preset: Preset, launcher: Sequence[str] = (), batch_size: int = 16
    ) -> dict[str, float]:
        """What watched.py says of a run."""
        steps = self.options.steps
        settings = {"data_dir": data, "image_size": preset.image_size, "batch_size": batch_size}
        settings |= {"output_dir": self.path("run"), "max_steps": steps, "log_steps": max(1, steps // 15)}
        settings |= {"checkpointing_steps": 0, "report_to": "none"}
        if recipe == "train_ldm":
            vae = self.path("vae")
            preset.build_vae().save_pretrained(vae)
            names = ("unet_widths", "layers_per_block")
            settings |= {name: preset.ldm[name] for name in names} | {"vae": vae, "validation_steps": 0}
        else:
            settings |= {"widths": preset.vae["widths"], "eval_images": 1}
        return run_watched(self.path("out"), recipe, settings, launcher)

    # ---- Tables --------------------------------------------------------------------------------------------

    def images(self, preset: Preset) -> list[str]:
        """Training from the latents, and sampling to disk, with more and more images."""
        rows, first = [], None
        for factor in self.options.factors:
            subjects = self.options.subjects * factor
            data = make_cohort(self.path("data"), subjects, SLICES, preset.image_size)
            count = subjects * SLICES
            found = self.train("train_ldm", data, preset)
            drawn = self.sample(preset, count // 2)
            first = first or (found, drawn)
            growth = [1024 * (one["own_GiB"] - base["own_GiB"]) for one, base in zip((found, drawn), first)]
            rest = found["seconds"] - self.options.steps / found["steps_per_second"]
            rows.append(
                (
                    f"{count} (×{factor})",
                    f"{found['steps_per_second'] * 16:.0f}",
                    f"{rest:.1f}",
                    f"{1024 * found['own_GiB']:.0f} ({growth[0]:+.0f})",
                    f"{count / drawn['seconds']:.1f}",
                    f"{1024 * drawn['own_GiB']:.0f} ({growth[1]:+.0f})",
                )
            )
            print(" | ".join(rows[-1]), flush=True)
        header = ("images", "LDM step, images/s", "all but steps, s", "own memory, MiB")
        return table((*header, "sampled, images/s", "own memory, MiB"), rows)

    def sample(self, preset: Preset, per_class: int) -> dict[str, float]:
        """sample.py with two steps, so that what is not the network shows."""
        model, denoiser = self.path("model"), preset.build_denoiser()
        scheduler = DDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        )
        parts = (preset.build_vae(), denoiser.unet, denoiser.class_embedding, scheduler)
        ClassConditionalLDMPipeline(*parts).save_pretrained(model)
        settings = {"model": model, "output_dir": self.path("samples"), "num_images": per_class, "steps": 2}
        return run_watched(self.path("out"), "sample", settings)

    def sizes(self, subjects: int) -> list[str]:
        """Both steps with larger and larger slices; the latents grow alike."""
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
        return table(("slices", "VAE step, images/s", "LDM step, images/s", "GiB, most"), rows)

    def processes(self, preset: Preset, subjects: int) -> list[str]:
        """One batch shared out over one process and two, or as many as there are GPUs."""
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
        return table(("processes", "LDM step, images/s", "of one", "own memory of the first, MiB"), rows)


def small_preset(image_size: int) -> Preset:
    """Networks that leave the time to everything else."""
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
    lines += ["", "Own memory leaves out mapped files; in brackets, MiB more than with the fewest images."]
    report("scaling", "Scaling", lines, options.results)


if __name__ == "__main__":
    main()
