"""Fine-tuning on 40 subjects of another contrast and plane, against training from scratch: a table.

    python benchmarks/finetune.py --model runs/demo/ldm [--vae_steps 300] [--steps 200] [--repeats 3]
    python benchmarks/finetune.py --text_model runs/text [--work runs/finetune] [--repeats 3]

The phantom cohort is coronal and T2-like, of subjects that the model (sagittal, T1) was not trained on. The
autoencoder and the denoiser are trained from scratch, fine-tuned from the model's weights, and fine-tuned
with a LoRA of the denoiser: with the same networks, batch sizes and number of updates, and nearly the same
time. With --text_model the model is a small Stable Diffusion, text-conditioned and trained here, unless the
folder is there, on 400 subjects of sagittal and coronal T1. The cohort is then axial and T2-like, the
autoencoder is fine-tuned with --decoder_only, and both ways have a row of a tenth of the updates.

KID is that of samples by default, and of the same samples without the noise that the decoder adds, whose
texture has the statistics of real slices whatever the networks have learned. With --work the runs are kept,
and a benchmark that was stopped goes on with those that are missing.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from held_out import FEATURES, HeldOutMetrics, format_kid
from measure import RESULTS, flags, report, run, spread, table
from text_pipeline import train_text_pipeline

import numpy as np  # isort: skip
from diffusers import DiffusionPipeline

from adni_ldm.evaluation.image_sets import ImageSet, load_samples
from adni_ldm.loading import load_base
from adni_ldm.preprocessing.phantom import write_phantom_cohort

COHORT_SEED = 7  # other subjects than those of the demo, whose cohort has seed 0
COLUMNS = ("training", "seconds", "denoiser, MiB", "PSNR, dB", "KID × 1000", "precision", "recall")
COLUMNS += ("KID × 1000 without the decoder's noise",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="runs/demo/ldm", help="pipeline to start from")
    parser.add_argument("--text_model", type=Path, help="text-conditioned pipeline to start from")
    parser.add_argument("--text_vae_steps", type=int, default=1500, help="updates of its autoencoder")
    parser.add_argument("--text_steps", type=int, default=2500, help="updates of its denoiser")
    parser.add_argument("--text_subjects", type=int, default=400, help="subjects that it is trained on")
    parser.add_argument("--image_size", type=int, default=64, help="side of its slices, pixels")
    parser.add_argument("--vae_steps", type=int, default=300, help="updates of an autoencoder")
    parser.add_argument("--steps", type=int, default=200, help="updates of a denoiser")
    parser.add_argument("--vae_batch_size", type=int, default=8, help="slices of an autoencoder's update")
    parser.add_argument("--batch_size", type=int, default=16, help="slices of a denoiser's update")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak, of all runs")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank of the LoRA")
    parser.add_argument("--slices", type=int, default=8, help="slices of a subject")
    parser.add_argument("--num_images", type=int, default=64, help="samples of each class")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, each with its own seed")
    parser.add_argument("--work", type=Path, help="folder to keep the runs in; default: a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="adni_ldm_finetune_") as name:
        work = (options.work or Path(name)).resolve()
        text = options.text_model is not None
        model = (options.text_model or Path(options.model)).resolve()
        if text and not (model / "model_index.json").is_file():
            train_text_pipeline(model, work / "pretraining", options)
        pipeline = load_base(str(model), ("AD", "NC"))
        size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        cohort = {"subjects": 58, "slices": options.slices, "image_size": size, "seed": COHORT_SEED}
        if not (work / "data").is_dir():
            write_phantom_cohort(work / "data", **cohort, plane="axial" if text else "coronal", contrast="t2")
        metrics = HeldOutMetrics(work / "data", size, 2 * options.num_images)
        real = cells([evaluate(metrics, metrics.others)])
        rows = [("real training slices (reference)", *"–––", *real, "–")]
        if not text:
            found, means = ([one] for one in evaluate_model(options, metrics, model, work / "before"))
            rows.append(("model before fine-tuning", *"–––", *cells(found), cells(means)[0]))
        recipes = Recipes(work, options, pipeline, model)
        lora = {"lora_rank": options.lora_rank}
        shape = recipes.shape_of_denoiser()
        arms = [("from scratch", False, 1, shape), ("fine-tuned", True, 1, {})]
        arms.append((f"LoRA of rank {options.lora_rank}", True, 1, lora))
        if text:
            arms.insert(1, ("fine-tuned, a tenth of the updates", True, 10, {}))
            arms.insert(2, ("from scratch, a tenth of the updates", False, 10, shape))
        for title, tuned, part, more in arms:
            name = title.replace(" ", "-").replace(",", "")
            runs = [recipes.run(f"{name}-{seed}", tuned, part, more, seed) for seed in range(options.repeats)]
            found, means = zip(*(evaluate_model(options, metrics, one.folder, one.folder) for one in runs))
            row = (title, spread([one.seconds for one in runs], 0), f"{runs[0].mib:.1f}")
            rows.append((*row, spread([one.psnr for one in runs]), *cells(found), cells(means)[0]))
            print(" | ".join(rows[-1]), flush=True)

    lines = [
        f"{len(metrics.train)} training slices of {len(set(metrics.train.subjects))} subjects, "
        f"{len(metrics.held_out)} test slices of {len(set(metrics.held_out.subjects))}, {size} px; "
        f"{options.vae_steps} updates of {options.vae_batch_size} slices, then {options.steps} of "
        f"{options.batch_size}; {2 * options.num_images} samples by 20 steps of DPM-Solver++ without "
        "guidance.",
        "",
        *table(COLUMNS, rows),
        "",
        f"- Median of {options.repeats} runs; in brackets the lowest and highest, for KID the 95 % interval "
        "of the median run. Seconds are those of both runs. PSNR is the autoencoder's, on held-out subjects.",
        f"- KID, precision and recall are against the test slices; {FEATURES}",
    ]
    report("finetune_text" if text else "finetune", "Fine-tuning", lines, options.results)


class Run(NamedTuple):
    """A trained pipeline."""

    folder: Path
    seconds: float  # of both recipes
    psnr: float  # of its autoencoder, dB
    mib: float  # of the denoiser's weights, or of the LoRA's


class Recipes:
    """The two recipes with the sizes of the model's networks."""

    def __init__(self, work: Path, options: argparse.Namespace, pipeline: DiffusionPipeline, model: Path):
        self.work, self.options, self.model = work, options, model
        self.vae, self.unet = pipeline.vae.config, pipeline.unet.config
        size = self.unet.sample_size * pipeline.vae_scale_factor
        self.common = {"data_dir": work / "data", "image_size": size, "report_to": "none"}
        self.common |= {"learning_rate": options.learning_rate, "checkpointing_steps": 0}

    def shape_of_denoiser(self) -> dict:
        widths, layers = list(self.unet.block_out_channels), self.unet.layers_per_block
        return {"unet_widths": widths, "layers_per_block": layers, "token_dim": self.unet.cross_attention_dim}

    def autoencoder(self, tuned: bool, part: int, seed: int) -> Path:
        """Folder of an autoencoder, trained once: a LoRA uses the fine-tuned one."""
        folder, steps = self.work / f"vae-{tuned}-{part}-{seed}", max(1, self.options.vae_steps // part)
        settings = self.common | {"max_steps": steps, "output_dir": folder, "seed": seed}
        settings |= {"batch_size": self.options.vae_batch_size, "warmup_steps": steps // 20}
        if tuned:
            settings |= {"init_from": self.model, "decoder_only": bool(self.options.text_model)}
        else:
            settings |= {"widths": list(self.vae.block_out_channels)}
            settings |= {"latent_channels": self.vae.latent_channels}
        train("train_vae", settings)
        return folder

    def run(self, name: str, tuned: bool, part: int, more: dict, seed: int) -> Run:
        """Train autoencoder and denoiser with 1 / part of the updates, from the model or from scratch."""
        vae = self.autoencoder(tuned, part, seed)
        folder, steps = self.work / name, max(1, self.options.steps // part)
        more = more | ({"init_from": self.model} if tuned else {})
        settings = self.common | {"vae": vae, "max_steps": steps, "output_dir": folder, "seed": seed}
        settings |= {"batch_size": self.options.batch_size, "warmup_steps": steps // 20, "snr_gamma": 0}
        settings |= {"validation_steps": 0, "ema_halflife_images": steps * self.options.batch_size // 10}
        train("train_ldm", settings | more)
        weights = folder / "pytorch_lora_weights.safetensors"
        weights = weights if weights.is_file() else folder / "unet/diffusion_pytorch_model.safetensors"
        mib = weights.stat().st_size / 2**20
        return Run(folder, seconds(vae) + seconds(folder), last(vae, "val_psnr"), mib)


def train(recipe: str, settings: dict) -> None:
    """Run a recipe, if its run is not there and finished."""
    if not seconds(settings["output_dir"]):
        run([sys.executable, f"{recipe}.py", *flags(settings)])


def seconds(folder: Path) -> float:
    """Seconds that a finished run took, from its record, which is written last; 0 if there is none."""
    record = folder / "run.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    if "finished" not in found:
        return 0.0
    return record.stat().st_mtime - datetime.fromisoformat(found["starts"][0]["time"]).timestamp()


def last(folder: Path, name: str) -> float:
    """The last value of that name in a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]][-1]


def evaluate_model(
    options: argparse.Namespace, metrics: HeldOutMetrics, model: Path, folder: Path
) -> tuple[dict, dict]:
    """Metrics of samples by sample.py with the decoder's noise, and without it; of the same latents."""
    settings = {"model": model, "num_images": options.num_images, "batch_size": 50, "seed": 0}
    settings |= {"num_inference_steps": 20, "scheduler": "dpm++", "guidance_scale": 1}
    found = []
    for name, noisy in (("samples", True), ("means", False)):
        own = {"output_dir": folder / name, "decoder_noise": noisy}
        run([sys.executable, "sample.py", *flags(settings | own)])
        found.append(evaluate(metrics, load_samples(folder / name, ("AD", "NC"))))
    return found[0], found[1]


def evaluate(metrics: HeldOutMetrics, samples: ImageSet) -> dict:
    """KID, precision and recall, among others."""
    return metrics.compare(samples.floats(), np.asarray(samples.subjects))


def cells(found: list[dict]) -> tuple[str, str, str]:
    """KID of the run of median KID, and the medians of precision and recall."""
    middle = sorted((one["kid"] for one in found), key=lambda kid: kid.value)[len(found) // 2]
    return format_kid(middle), *(
        f"{statistics.median(one[name].value for one in found):.2f}" for name in ("precision", "recall")
    )


if __name__ == "__main__":
    main()
