"""Shared by the benchmarks: interleaved timing, the machine's peak, models of a preset, and the table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402

from adni_ldm.environment import installed_versions  # noqa: E402
from adni_ldm.models import (  # noqa: E402
    ClassEmbedding,
    ConditionalDenoiser,
    build_autoencoder,
    build_denoiser,
)

LIBRARIES = ("torch", "diffusers", "accelerate", "monai", "torchmetrics")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PRECISION = torch.bfloat16
SIDES = (1024, 2048) if DEVICE.type == "cpu" else (4096, 8192)  # of matrix products, for the peak


@dataclass(frozen=True)
class Preset:
    """Sizes read from configs/NAME/, so that a benchmark measures what the presets train."""

    name: str
    image_size: int
    vae: dict
    ldm: dict

    @classmethod
    def load(cls, name: str) -> Preset:
        """Read configs/NAME/."""
        if name == "tiny":  # sizes for a test
            vae = {"widths": [16, 32], "latent_channels": 4, "batch_size": 2, "image_size": 32}
            return cls(name, 32, vae, {"unet_widths": [32, 64], "layers_per_block": 1, "batch_size": 2})
        vae, ldm = (
            yaml.safe_load((ROOT / f"configs/{name}/{part}.yaml").read_text()) for part in ("vae", "ldm")
        )
        return cls(name, vae["image_size"], vae, ldm)

    def batch_size(self, recipe: dict, on_cpu: int | None = None) -> int:
        """Batch size of the recipe; `on_cpu` replaces that of the ADNI preset, which is for a GPU."""
        return on_cpu if on_cpu and self.name == "adni" and DEVICE.type == "cpu" else recipe["batch_size"]

    def build_vae(self) -> AutoencoderKL:
        """Its autoencoder, untrained: it takes the same time as a trained one."""
        vae = build_autoencoder(self.image_size, **self.vae_shape)
        channels = vae.config.latent_channels
        vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
        return vae.requires_grad_(False)

    def build_denoiser(self) -> ConditionalDenoiser:
        """Its denoiser, untrained."""
        side = self.image_size // 2 ** (len(self.widths_by_pixels) - 1)
        shape = self.ldm_shape
        unet = build_denoiser(self.vae["latent_channels"], side, shape.pop("unet_widths"), **shape)
        return ConditionalDenoiser(unet, ClassEmbedding())

    @property
    def vae_shape(self) -> dict:
        """Settings of train_vae.py that make its autoencoder."""
        names = ("widths", "latent_channels", "layers_per_block", "patch_size")
        return {name: self.vae[name] for name in names if name in self.vae}

    @property
    def ldm_shape(self) -> dict:
        """Settings of train_ldm.py that make its denoiser."""
        names = ("unet_widths", "layers_per_block", "attention_levels")
        return {name: self.ldm[name] for name in names if name in self.ldm}

    @property
    def widths_by_pixels(self) -> tuple[int, ...]:
        """Widths of an autoencoder of the same latents whose first level sees single pixels, as peers' do."""
        widths, patch = list(self.vae["widths"]), self.vae.get("patch_size", 1)
        while patch > 1:
            widths.insert(0, widths[0] // 2)
            patch //= 2
        return tuple(widths)


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each call in each round, in turn, so that a temporary load affects all of them; seconds.

    The first round is a warm-up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, with minimum and maximum if there are several values."""
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) < 2:
        return middle
    return f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def matmul_peak(dtype: torch.dtype, rounds: int = 7, sides: Sequence[int] = SIDES) -> float:
    """Highest FLOP/s of square matrix products of that type, over several sizes."""
    best = 0.0
    for side in sides:
        one = torch.randn(side, side, device=DEVICE).to(dtype)
        seconds = interleaved({"product": lambda one=one: one @ one}, rounds)["product"]
        best = max(best, 2 * side**3 / statistics.median(seconds))
    return best


def run(command: Sequence[object]) -> None:
    """Run a command without output; end the benchmark with the end of its output if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(f"{' '.join(words)}\n{(result.stdout + result.stderr)[-3000:]}")


def run_profiled(out: Path, recipe: str, settings: Mapping, launcher: Sequence[str] = ()) -> dict[str, float]:
    """Run a recipe by profile_recipe.py: steps_per_second, GiB, own_GiB and seconds."""
    command = [
        sys.executable,
        *launcher,
        "benchmarks/profile_recipe.py",
        out,
        f"{recipe}.py",
        *flags(settings),
    ]
    run(command)
    return json.loads(out.read_text())


def flags(settings: Mapping) -> list[str]:
    """`--name value` for each setting; a list becomes several values."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def make_cohort(folder: Path, subjects: int, slices: int, image_size: int) -> Path:
    """Make a phantom cohort."""
    settings = {"output_dir": folder, "subjects": subjects, "slices": slices, "image_size": image_size}
    run([sys.executable, "prepare_data.py", "phantom", *flags(settings)])
    return folder


def machine() -> str:
    """Name of the GPU, or of the processor."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def conditions() -> str:
    """Machine, load, date and versions, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions(LIBRARIES).items())
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    return f"{machine()}; {cores}; {date.today()}; {versions}."


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]


def results_path(name: str, folder: Path) -> Path:
    """folder/NAME_MACHINE.md, in characters that are valid on every file system."""
    words = "".join(letter if letter.isalnum() else " " for letter in machine()).split()
    return folder / f"{name}_{'_'.join(words)}.md"


def report(name: str, title: str, lines: Sequence[str], folder: Path) -> None:
    """Print the page, and write it to `folder`."""
    page = "\n".join([f"# {title}", "", conditions(), "", *lines]) + "\n"
    print(page)
    path = results_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    print(f"written to {path}")
