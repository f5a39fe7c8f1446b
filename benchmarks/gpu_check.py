"""Checks that need a CUDA device: `make gpu-check`. Without one it prints so and exits with 0.

Trains both recipes for 300 steps in fp16 and bf16; resumes under --deterministic and compares the weights
bit for bit; compares xformers with SDPA (loss to 1e-3) and compiled with plain networks; measures memory and
speed of each flag; starts FSDP and, if installed, DeepSpeed. Prints one table and writes it to
benchmarks/results/gpu_check_NAME_DATE.md with the machine's name and versions.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WEIGHTS = {
    "train_vae": "diffusion_pytorch_model.safetensors",
    "train_ldm": "unet/diffusion_pytorch_model.safetensors",
}
FLAGS = {
    "default": [],
    "--gradient_checkpointing": ["--gradient_checkpointing"],
    "--gradient_accumulation_steps 2 --batch_size 8": [
        *("--gradient_accumulation_steps", "2"),
        *("--batch_size", "8"),
    ],
    "--attention xformers": ["--attention", "xformers"],
    "--compile": ["--compile"],
    "--channels_last false": ["--channels_last", "false"],
    "--optimizer adamw8bit": ["--optimizer", "adamw8bit"],
    "--offload_ema": ["--offload_ema"],
    "--deterministic": ["--deterministic"],
}


class Bench:
    """Runs recipes and collects the rows of the table."""

    def __init__(self, work: Path, steps: int, image_size: int):
        self.work, self.steps, self.number = work, steps, 0
        self.rows: list[tuple[str, ...]] = []
        self.common = {"data_dir": work / "data", "image_size": image_size, "batch_size": 16, "log_steps": 10}
        self.common |= {"max_steps": steps, "report_to": "none", "checkpointing_steps": 0, "warmup_steps": 20}

    def words(self, recipe: str, folder: Path, *more: str, **settings) -> list[str]:
        values = self.common | {"output_dir": folder} | settings
        if recipe == "train_ldm":
            values |= {"vae": self.work / "vae", "validation_steps": 0}
        words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        return [f"{recipe}.py", *words, *more]

    def run(
        self, recipe: str, *more: str, folder: Path | None = None, launcher: list | None = None, **settings
    ):
        """Run a recipe; returns its folder, what was measured, and one line of the error if it failed."""
        self.number += 1
        folder = folder or self.work / f"run{self.number}"
        measured = self.work / f"run{self.number}.json"
        start = (
            [sys.executable, "benchmarks/profile_recipe.py", str(measured)] if launcher is None else launcher
        )
        command = [*start, *self.words(recipe, folder, *more, **settings)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        began = time.monotonic()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        seconds = time.monotonic() - began
        if result.returncode:
            lines = (result.stdout + result.stderr).strip().splitlines()
            errors = [line for line in lines if "rror" in line]
            return folder, {}, (errors or lines or ["no output"])[-1][:140]
        numbers = json.loads(measured.read_text()) if measured.is_file() else {}
        return folder, numbers | {"seconds": seconds}, None

    def add(self, *cells: object) -> None:
        self.rows.append(tuple(str(cell) for cell in cells))
        print(" | ".join(self.rows[-1]), flush=True)

    def add_run(self, name: str, folder: Path, numbers: dict, failure: str | None, verdict: str = "") -> None:
        if failure:
            self.add(name, "–", "–", "–", failure)
            return
        loss, skipped = last_loss(folder)
        speed = numbers.get("steps_per_second")
        verdict = verdict or (f"{skipped} updates skipped" if skipped else "ok")
        self.add(
            name,
            f"{loss:.4f}",
            f"{speed:.1f}" if speed else "–",
            f"{numbers['GiB']:.2f}" if "GiB" in numbers else "–",
            verdict,
        )


def last_loss(folder: Path) -> tuple[float, int]:
    """Loss of the last line of metrics.csv, and the number of skipped updates."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    return float(rows[-1]["loss"]), int(rows[-1]["skipped"])


def losses(folder: Path) -> torch.Tensor:
    with (folder / "metrics.csv").open() as file:
        return torch.tensor([float(row["loss"]) for row in csv.DictReader(file) if row["loss"]])


def sha256(recipe: str, folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS[recipe]).read_bytes()).hexdigest()


def check(bench: Bench) -> None:
    """Add all rows of the table."""
    _, _, failure = bench.run("train_vae", "--mixed_precision", "bf16", folder=bench.work / "vae")
    if failure:
        raise SystemExit(f"gpu-check: train_vae.py fails in bf16: {failure}")

    for recipe in WEIGHTS:
        for precision in ("no", "bf16", "fp16"):
            folder, numbers, failure = bench.run(recipe, "--mixed_precision", precision)
            bench.add_run(f"{recipe}, {precision}, {bench.steps} steps", folder, numbers, failure)

    for recipe in WEIGHTS:  # resumed from the middle, and compared with the whole run
        for precision in ("bf16", "fp16"):
            more = ("--deterministic", "--mixed_precision", precision)
            saved = {"checkpointing_steps": bench.steps // 2}
            whole, numbers, failure = bench.run(recipe, *more, **saved)
            if not failure:
                middle = whole / f"checkpoints/step-{bench.steps // 2:08d}"
                resumed, _, failure = bench.run(recipe, *more, resume_from_checkpoint=middle, **saved)
            same = not failure and sha256(recipe, whole) == sha256(recipe, resumed)
            verdict = "bit-identical" if same else "NOT IDENTICAL"
            bench.add_run(
                f"{recipe}, {precision}, resumed under --deterministic", whole, numbers, failure, verdict
            )

    for recipe in WEIGHTS:
        plain = None
        for name, flags in FLAGS.items():
            more = ("--mixed_precision", "bf16", *flags)  # of a flag given twice, the last one counts
            folder, numbers, failure = bench.run(recipe, *more, max_steps=min(bench.steps, 100))
            verdict = ""
            if failure is None:
                found = losses(folder)
                plain = found if plain is None else plain
                difference = (found - plain).abs()
                verdict = f"first loss differs by {difference[0]:.1e}, mean {difference.mean():.1e}"
                if "xformers" in name and difference[0] > 1e-3:
                    verdict += ": MORE THAN 1e-3"
            bench.add_run(f"{recipe}, bf16, {name}", folder, numbers, failure, verdict)

    count = torch.cuda.device_count()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
    for name in ("fsdp", "deepspeed_zero2"):
        if name.startswith("deepspeed") and find_spec("deepspeed") is None:
            bench.add(f"train_ldm, {name}", "–", "–", "–", "deepspeed is not installed")
            continue
        if name == "fsdp" and count < 2:
            bench.add(f"train_ldm, {name}", "–", "–", "–", "needs two GPUs")
            continue
        launcher = [*launch, "--config_file", f"configs/accelerate/{name}.yaml"]
        folder, numbers, failure = bench.run("train_ldm", launcher=launcher, max_steps=20)
        bench.add_run(f"train_ldm, {name}, {count} GPUs", folder, numbers, failure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="updates of a run")
    parser.add_argument("--image_size", type=int, default=128, help="side of the slices, pixels")
    parser.add_argument("--data_dir", help="slices to train on; default: a phantom cohort")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device is visible here; nothing was checked")
        return 0

    device = torch.cuda.get_device_name(0)
    with tempfile.TemporaryDirectory(prefix="adni_ldm_gpu_") as name:
        work = Path(name)
        bench = Bench(work, options.steps, options.image_size)
        if options.data_dir:
            bench.common["data_dir"] = Path(options.data_dir).resolve()
        else:
            make = [sys.executable, "prepare_data.py", "phantom", "--output_dir", str(work / "data")]
            make += ["--subjects", "40", "--slices", "6", "--image_size", str(options.image_size)]
            subprocess.run(make, cwd=ROOT, check=True)
        check(bench)

    libraries = ("torch", "diffusers", "accelerate", "xformers", "bitsandbytes", "deepspeed")
    versions = [f"{name} {metadata.version(name)}" for name in libraries if find_spec(name)]
    lines = [
        f"# GPU check, {device}, {date.today()}",
        "",
        f"{torch.cuda.device_count()} × {device}, CUDA {torch.version.cuda}; {', '.join(versions)}. "
        f"Slices of {options.image_size} px, batch 16.",
        "",
        "| run | last loss | steps/s | peak GiB | |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in bench.rows),
    ]
    results = ROOT / "benchmarks/results"
    results.mkdir(exist_ok=True)
    path = results / f"gpu_check_{device.replace(' ', '_')}_{date.today()}.md"
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"written to {path}")
    return int(any("NOT IDENTICAL" in row[-1] or "MORE THAN" in row[-1] for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
