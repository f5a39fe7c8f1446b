"""Images per second of the VAE step, latent encoding, the LDM step and sampling: a table.

    python benchmarks/throughput.py [--presets demo adni] [--steps 30] [--rounds 3]

The training steps are those of the unchanged recipes (profile_recipe.py), beside plain_loop.py, the same
modules in the loop of a typical example script. Runs alternate, and medians are given with minimum and
maximum. FLOPs are counted by torch's FlopCounterMode; their share is of the fastest matrix product measured
in the same precision. On a CPU the adni preset runs with smaller batches and fewer steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from measure import (
    DEVICE,
    PRECISION,
    RESULTS,
    Preset,
    flags,
    interleaved,
    make_cohort,
    matmul_peak,
    report,
    run,
    run_profiled,
    spread,
    table,
)

import torch  # isort: skip
from diffusers import DDIMScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode

from adni_ldm.data.slices import SliceTensors, load_slices, to_arrays
from adni_ldm.models.autoencoder import ReconstructingVAE, latent_shape
from adni_ldm.pipeline import ClassConditionalLDMPipeline

GUIDANCE = 1.5
COLUMNS = ("stage", "images/s", "GFLOP per image", "share of peak", "peak GiB")


class Bench:
    """Folder, models and rows of one preset."""

    def __init__(self, work: Path, preset: Preset, options: argparse.Namespace):
        self.work, self.preset, self.options = work, preset, options
        work.mkdir()
        # enough that a run on a CPU ends within the first epoch: validation is not to be timed
        self.data = make_cohort(work / "data", subjects=40, slices=10, image_size=preset.image_size)
        self.vae, self.denoiser = preset.build_vae().to(DEVICE), preset.build_denoiser().to(DEVICE)
        self.vae.save_pretrained(work / "vae")
        self.shape = latent_shape(self.vae, preset.image_size)
        self.peaks = {dtype: matmul_peak(dtype) for dtype in (torch.float32, PRECISION)}
        self.rows: list[tuple] = []
        self.number = 0
        slow = DEVICE.type == "cpu" and preset.name == "adni"  # the plain loop takes ten seconds a step there
        self.steps, self.sampling_steps, self.encoded = options.steps, options.sampling_steps, None
        if slow:
            self.steps, self.sampling_steps, self.encoded = max(9, options.steps // 3), 10, 64

    def add(self, what: str, speeds: list[float], gflop: float | None, dtype: torch.dtype, gib=None) -> float:
        """Add a row; returns the median speed."""
        median = statistics.median(speeds)
        share = f"{100 * median * gflop * 1e9 / self.peaks[dtype]:.0f} %" if gflop else "–"
        row = (f"{self.preset.name}: {what}", spread(speeds), f"{gflop:.2f}" if gflop else "–", share)
        self.rows.append((*row, f"{gib:.2f}" if gib else "–"))
        print(" | ".join(self.rows[-1]), flush=True)
        return median

    def recipe(self, name: str, settings: dict, *more: str) -> dict:
        """Profile a recipe with the preset's sizes."""
        self.number += 1
        common = {"data_dir": self.data, "image_size": self.preset.image_size, "report_to": "none"}
        common |= {"max_steps": self.steps, "log_steps": max(1, self.steps // 15)}
        common |= {"checkpointing_steps": 0, "output_dir": self.work / f"run{self.number}"}
        out = self.work / f"run{self.number}.json"
        return run_profiled(out, name, common | settings, *more)

    # ---- Rows ----------------------------------------------------------------------------------------------

    def ldm_step(self) -> list[str]:
        """Measure the recipe's step and the plain loop's; returns lines with their ratios."""
        batch = self.preset.batch_size(self.preset.ldm, on_cpu=16)
        sizes = self.preset.ldm_shape | {"batch_size": batch}
        ours = sizes | {"vae": self.work / "vae", "validation_steps": 0}
        kinds = {"LDM step, train_ldm.py": ours}
        if self.options.compile:
            kinds["LDM step, train_ldm.py --compile"] = ours | {"compile": True}
        plain = ["benchmarks/plain_loop.py", self.work / "plain.json"]
        plain += flags(sizes | {"data_dir": self.data, "vae": self.work / "vae"})
        plain += flags({"image_size": self.preset.image_size, "max_steps": self.steps})
        runs: dict[str, list[dict]] = {}
        for _ in range(self.options.rounds):
            for name, settings in kinds.items():
                runs.setdefault(name, []).append(self.recipe("train_ldm", settings))
            for name, word in (("float32", []), ("bf16 autocast", ["--autocast"])):
                run([sys.executable, *plain, *word])
                result = json.loads((self.work / "plain.json").read_text())
                runs.setdefault(f"LDM step, plain loop, {name}", []).append(result)

        gflop = self.gflop_of_ldm_step()
        encoding = self.gflop_of_encoding()
        speeds = {}
        for name, results in runs.items():
            images = [result["steps_per_second"] * batch for result in results]
            work = gflop + encoding if "plain" in name else gflop
            dtype = torch.float32 if "float32" in name else PRECISION
            speeds[name] = self.add(
                f"{name}, batch {batch}", images, work, dtype, max(result["GiB"] for result in results)
            )
        best = max(speeds[name] for name in kinds)
        return [
            f"- {self.preset.name}: the LDM step is {best / speeds[name]:.2f}× {name.partition(', ')[2]}."
            for name in speeds
            if "plain" in name
        ]

    def vae_step(self) -> None:
        batch = self.preset.batch_size(self.preset.vae, on_cpu=2)
        settings = self.preset.vae_shape | {"batch_size": batch, "eval_images": 1}
        if "spectral_weight" in self.preset.vae:
            settings["spectral_weight"] = self.preset.vae["spectral_weight"]
        results = [self.recipe("train_vae", settings) for _ in range(self.options.rounds)]
        images = [result["steps_per_second"] * batch for result in results]
        memory = max(result["GiB"] for result in results)
        self.add(
            f"VAE step, train_vae.py, batch {batch}", images, self.gflop_of_vae_step(), PRECISION, memory
        )

    def encoding(self) -> None:
        """Measure encoding as in train_ldm.py: in float32, with reading the slices."""
        slices = SliceTensors(to_arrays(load_slices(self.data)["train"], self.preset.image_size))
        slices = Subset(slices, range(len(slices))[: self.encoded])

        @torch.no_grad()
        def encode():
            for batch in DataLoader(slices, 16):
                self.vae.encode(batch["image"].to(DEVICE))

        seconds = interleaved({"encode": encode}, self.options.rounds)["encode"]
        speeds = [len(slices) / one for one in seconds]
        self.add("latent encoding, float32", speeds, self.gflop_of_encoding(), torch.float32)

    @torch.no_grad()
    def sampling(self) -> list[str]:
        """Measure the pipeline and its U-Net calls alone; returns a line with its overhead."""
        steps, batch = self.sampling_steps, self.preset.batch_size(self.preset.ldm, on_cpu=4)
        scheduler = DDIMScheduler(
            prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
        )
        unet, embedding = self.denoiser.unet, self.denoiser.class_embedding
        pipeline = ClassConditionalLDMPipeline(self.vae, unet, embedding, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        noise = torch.randn(2 * batch, *self.shape, device=DEVICE)
        tokens = embedding(torch.zeros(2 * batch, dtype=torch.long, device=DEVICE)).tokens
        generator = torch.Generator().manual_seed(0)

        def generate(kind: str):
            with torch.autocast(DEVICE.type, PRECISION):
                pipeline([0] * batch, steps, GUIDANCE, generator=generator, output_type=kind)

        def unet_alone():
            with torch.autocast(DEVICE.type, PRECISION):
                for step in range(steps):
                    unet(noise, step, encoder_hidden_states=tokens, return_dict=False)

        calls = {"latents": lambda: generate("latent"), "U-Net": unet_alone, "images": lambda: generate("pt")}
        seconds = interleaved(calls, self.options.rounds)
        unet_call = self.count(lambda: unet(noise[:2], 1, encoder_hidden_states=tokens[:2])) / 1e9
        decode = self.count(lambda: pipeline.decode_latents(noise[:1])) / 1e9
        speeds = [batch / one for one in seconds["images"]]
        what = f"sampling, {steps} steps with guidance, batch {batch}"
        self.add(what, speeds, steps * unet_call + decode, PRECISION)
        overheads = [100 * (one / two - 1) for one, two in zip(seconds["latents"], seconds["U-Net"])]
        text = "the pipeline takes {} % more time than its U-Net calls alone, in the same round."
        return [f"- {self.preset.name}: " + text.format(spread(overheads))]

    # ---- FLOPs ---------------------------------------------------------------------------------------------

    def count(self, call) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def gflop_of_ldm_step(self) -> float:
        noisy, labels = (
            torch.randn(1, *self.shape, device=DEVICE),
            torch.zeros(1, dtype=torch.long, device=DEVICE),
        )
        return self.count(lambda: self.denoiser(noisy, labels, labels).sum().backward()) / 1e9

    def gflop_of_vae_step(self) -> float:
        model = ReconstructingVAE(self.preset.build_vae().requires_grad_(True)).to(DEVICE)
        images = torch.randn(1, 1, self.preset.image_size, self.preset.image_size, device=DEVICE)
        noise = torch.randn(1, *self.shape, device=DEVICE)
        return self.count(lambda: model(images, noise)[0].sum().backward()) / 1e9

    def gflop_of_encoding(self) -> float:
        images = torch.randn(1, 1, self.preset.image_size, self.preset.image_size, device=DEVICE)
        return self.count(lambda: self.vae.encode(images)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    presets = ["adni"] if DEVICE.type == "cuda" else ["demo", "adni"]
    parser.add_argument(
        "--presets", nargs="+", default=presets, help="folders of configs/ whose sizes are run"
    )
    parser.add_argument("--steps", type=int, default=300 if DEVICE.type == "cuda" else 30, help="of a run")
    parser.add_argument("--sampling_steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions")
    parser.add_argument(
        "--compile", action="store_true", default=DEVICE.type == "cuda", help="measure torch.compile as well"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()

    rows, notes, peaks, taken = [], [], {}, []
    with tempfile.TemporaryDirectory(prefix="adni_ldm_throughput_") as folder:
        for name in options.presets:
            bench = Bench(Path(folder) / name, Preset.load(name), options)
            notes += bench.ldm_step()
            bench.vae_step()
            bench.encoding()
            notes += bench.sampling()
            rows += bench.rows
            peaks = bench.peaks
            taken.append(f"{bench.steps} ({name})")
    peak = ", ".join(f"{str(dtype)[6:]} {flops / 1e12:.2f} TFLOP/s" for dtype, flops in peaks.items())
    lines = [
        f"Matrix products reach {peak}. Medians of {options.rounds} alternating runs of "
        f"{' and '.join(taken)} steps, minimum and maximum in brackets. Memory is the GPU's, or the resident "
        "memory of the process.",
        "",
        *table(COLUMNS, rows),
        "",
        *notes,
        "- Targets: LDM step at least 3× the plain loop on a CPU, 2.5× on a GPU; pipeline at most 5 %.",
    ]
    report("throughput", "Throughput", lines, options.results)


if __name__ == "__main__":
    main()
