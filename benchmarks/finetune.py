"""Is a model worth starting from? Forty subjects of another contrast and plane: prints a table.

    python benchmarks/finetune.py --model runs/demo/ldm [--steps 200] [--repeats 3]

A phantom cohort is made, coronal and T2-like, of people that the model (sagittal, T1) never saw. It is
trained on from scratch, from the model's weights, and by a LoRA beside them: the same U-Net, batches and
number of updates, so nearly the same seconds, which the table tells. All read latents of the model's own VAE.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import RESULTS, flags, report, run, spread, table
from yardstick import FEATURES, Yardstick, told

import numpy as np  # isort: skip

from adni_ldm.data.phantom import write_phantom_cohort
from adni_ldm.evaluation.image_sets import ImageSet, sample_set
from adni_ldm.loading import load_pipeline

COHORT_SEED = 7  # other people than those of the demo, whose cohort has seed 0


COLUMNS = ("trained", "seconds", "weights, MiB", "val_loss", "KID × 1000", "precision", "recall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="runs/demo/ldm", help="pipeline to start from")
    parser.add_argument("--steps", type=int, default=200, help="updates of a run")
    parser.add_argument("--batch_size", type=int, default=16, help="slices of an update")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak, of all runs")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank of the LoRA")
    parser.add_argument("--slices", type=int, default=8, help="slices of a subject")
    parser.add_argument("--num_images", type=int, default=64, help="slices drawn of each class")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, each with its own seed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()

    pipeline = load_pipeline(options.model)
    unet, model = pipeline.unet.config, Path(options.model).resolve()
    size = unet.sample_size * pipeline.vae_scale_factor
    shape = {"unet_widths": unet.block_out_channels, "layers_per_block": unet.layers_per_block}
    shape = {name: list(value) if isinstance(value, tuple) else value for name, value in shape.items()}
    starts = {
        "from scratch": {"vae": model / "vae", "token_dim": unet.cross_attention_dim, **shape},
        "from the model": {"init_from": model},
        f"LoRA of rank {options.lora_rank}": {"init_from": model, "lora_rank": options.lora_rank},
    }
    with tempfile.TemporaryDirectory(prefix="adni_ldm_finetune_") as name:
        work = Path(name)
        cohort = {"subjects": 58, "slices": options.slices, "image_size": size, "seed": COHORT_SEED}
        write_phantom_cohort(work / "data", **cohort, plane="coronal", contrast="t2")
        yardstick = Yardstick(work / "data", size, 2 * options.num_images)
        train, test = yardstick.train, yardstick.held_out
        drawn = draw(options, model, work / "before", 0)
        before = {"other real slices": yardstick.others, "the model, before": drawn}
        rows = [(title, "–", "–", "–", *cells([judge(yardstick, one)])) for title, one in before.items()]
        common = {"data_dir": work / "data", "image_size": size, "max_steps": options.steps}
        common |= {"batch_size": options.batch_size, "learning_rate": options.learning_rate}
        common |= {"warmup_steps": options.steps // 20, "snr_gamma": 0, "checkpointing_steps": 0}
        common |= {"sample_steps": options.steps, "num_inference_steps": 1, "report_to": "none"}
        for title, settings in starts.items():
            seconds, losses, found = [], [], []
            for seed in range(options.repeats):
                folder = work / f"{len(rows)}-{seed}"
                words = flags(common | settings | {"seed": seed, "output_dir": folder / "ldm"})
                started = time.perf_counter()
                run([sys.executable, "train_ldm.py", *words])
                seconds.append(time.perf_counter() - started)
                losses.append(held_out_loss(folder / "ldm"))
                found.append(judge(yardstick, draw(options, folder / "ldm", folder / "samples", seed)))
            written = folder / "ldm/pytorch_lora_weights.safetensors"
            if not written.is_file():
                written = folder / "ldm/unet/diffusion_pytorch_model.safetensors"
            row = (title, spread(seconds, 0), f"{written.stat().st_size / 2**20:.1f}", spread(losses, 4))
            rows.append((*row, *cells(found)))
            print(" | ".join(rows[-1]), flush=True)

    lines = [
        f"{len(train)} training slices of {len(set(train.subjects))} subjects, {len(test)} test slices of "
        f"{len(set(test.subjects))}, {size} px; {options.steps} updates of {options.batch_size} slices, "
        f"{2 * options.num_images} slices drawn by 20 steps of DPM-Solver++ without guidance.",
        "",
        *table(COLUMNS, rows),
        "",
        f"- Median of {options.repeats} runs; in brackets the lowest and highest, for KID the 95 % interval "
        "of the middle one. val_loss is the denoiser's error on held-out subjects.",
        f"- KID, precision and recall are against the test slices; {FEATURES}",
    ]
    report("finetune", "Fine-tuning", lines, options.results)


def draw(options: argparse.Namespace, model: Path, folder: Path, seed: int) -> ImageSet:
    """What sample.py draws of the model, which is written to the folder."""
    settings = {"model": model, "output_dir": folder, "num_images": options.num_images, "batch_size": 50}
    settings |= {"seed": seed, "steps": 20, "scheduler": "dpm++", "guidance_scale": 1}
    run([sys.executable, "sample.py", *flags(settings)])
    return sample_set(folder, ("AD", "NC"))


def judge(yardstick: Yardstick, drawn: ImageSet) -> dict:
    """Its KID, precision and recall, among others."""
    return yardstick.compare(drawn.floats(), np.asarray(drawn.subjects))


def cells(found: list[dict]) -> tuple[str, str, str]:
    """KID of the middle one, and the medians of precision and recall."""
    middle = sorted((one["kid"] for one in found), key=lambda kid: kid.value)[len(found) // 2]
    return told(middle), *(
        f"{statistics.median(one[name].value for one in found):.2f}" for name in ("precision", "recall")
    )


def held_out_loss(folder: Path) -> float:
    """The last val_loss of a run."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]][-1]


if __name__ == "__main__":
    main()
