"""Is a model worth starting from? Forty subjects of another contrast and plane: prints a table.

    python benchmarks/finetune.py --model runs/demo/ldm [--steps 150] [--repeats 1]

A phantom cohort is made, coronal and T2-like, of people that the model (sagittal, T1) never saw. It is
trained on from scratch, from the model's weights, and by a LoRA beside them: the same U-Net, batches and
number of updates, so nearly the same seconds, which the table tells. All read latents of the model's own VAE.

val_loss is the denoiser's error on held-out subjects. KID is between slices drawn and held-out test slices,
in that VAE's latents, means over 8 x 8 places; its first rows are training slices, and what the model draws
before. Medians over the repeats, each with a seed of its own.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from adni_ldm.data.phantom import write_phantom_cohort  # noqa: E402
from adni_ldm.data.slices import open_folder, read_slices  # noqa: E402
from adni_ldm.evaluation.estimates import Estimate  # noqa: E402
from adni_ldm.evaluation.features import Extractor, load_extractor  # noqa: E402
from adni_ldm.evaluation.fidelity import kernel_distance  # noqa: E402
from adni_ldm.evaluation.image_sets import ImageSet, real_set, sample_set  # noqa: E402
from adni_ldm.loading import load_pipeline  # noqa: E402

COHORT_SEED = 7  # other people than those of the demo, whose cohort has seed 0


def start(*words: object) -> float:
    """Run a recipe; seconds it took."""
    begin = time.perf_counter()
    command = [sys.executable, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return time.perf_counter() - begin


def kid(features: Extractor, real: ImageSet, drawn: ImageSet) -> Estimate:
    """Kernel distance of two sets of slices, with its interval over subjects and samples."""
    return kernel_distance(features(real), features(drawn), real.subjects, drawn.subjects)


def told(found: list[Estimate]) -> str:
    """The middle one of several runs' distances."""
    one = sorted(found, key=lambda estimate: estimate.value)[len(found) // 2]
    return f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="runs/demo/ldm", help="pipeline to start from")
    parser.add_argument("--steps", type=int, default=150, help="updates of a run")
    parser.add_argument("--batch_size", type=int, default=16, help="slices of an update")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="peak, of all runs")
    parser.add_argument("--lora_rank", type=int, default=8, help="rank of the LoRA")
    parser.add_argument("--slices", type=int, default=8, help="slices of a subject")
    parser.add_argument("--num_images", type=int, default=40, help="slices drawn of each class")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind")
    options = parser.parse_args()

    pipeline = load_pipeline(options.model)
    unet, model = pipeline.unet.config, Path(options.model).resolve()
    size = unet.sample_size * pipeline.vae_scale_factor
    features = load_extractor("vae", vae=pipeline.vae)
    shape = ["--unet_widths", *unet.block_out_channels, "--layers_per_block", unet.layers_per_block]
    shape += ["--token_dim", unet.cross_attention_dim]
    starts = {
        "from scratch": ["--vae", model / "vae", *shape],
        "from the model": ["--init_from", model],
        f"LoRA of rank {options.lora_rank}": ["--init_from", model, "--lora_rank", options.lora_rank],
    }
    draw = ["sample.py", "--num_images", options.num_images, "--steps", 20, "--scheduler", "dpm++"]
    draw += ["--guidance_scale", 1]

    with tempfile.TemporaryDirectory(prefix="adni_ldm_finetune_") as name:
        work = Path(name)
        cohort = {"subjects": 58, "slices": options.slices, "image_size": size, "seed": COHORT_SEED}
        write_phantom_cohort(work / "data", **cohort, plane="coronal", contrast="t2")
        splits = read_slices(open_folder(work / "data"), val_fraction=0.1)
        train, test = (real_set(splits[split], size) for split in ("train", "test"))
        start(*draw, "--model", model, "--output_dir", work / "model")
        before = {"training slices": train, "the model, before": samples(work / "model")}
        rows = [(title, "–", "–", "–", told([kid(features, test, drawn)])) for title, drawn in before.items()]
        common = ["--data_dir", work / "data", "--image_size", size, "--max_steps", options.steps]
        common += ["--batch_size", options.batch_size, "--learning_rate", options.learning_rate]
        common += ["--warmup_steps", options.steps // 20, "--snr_gamma", 0, "--checkpointing_steps", 0]
        common += ["--sample_steps", options.steps, "--num_inference_steps", 1, "--report_to", "none"]
        for title, words in starts.items():
            seconds, losses, distances = [], [], []
            for seed in range(options.repeats):
                folder = work / f"{len(rows)}-{seed}"
                words_of_run = ["--seed", seed, "--output_dir", folder / "ldm"]
                seconds.append(start("train_ldm.py", *common, *words, *words_of_run))
                losses.append(held_out_loss(folder / "ldm"))
                start(*draw, "--seed", seed, "--model", folder / "ldm", "--output_dir", folder / "samples")
                distances.append(kid(features, test, samples(folder / "samples")))
            written = folder / "ldm/pytorch_lora_weights.safetensors"
            if not written.is_file():
                written = folder / "ldm/unet/diffusion_pytorch_model.safetensors"
            row = [title, f"{statistics.median(seconds):.0f}", f"{written.stat().st_size / 2**20:.1f}"]
            row += [f"{statistics.median(losses):.4f}", told(distances)]
            rows.append(tuple(row))
            print(" | ".join(row), flush=True)

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    print(
        f"\n{len(train)} training slices of {len(set(train.subjects))} subjects, {len(test)} test slices of "
        f"{len(set(test.subjects))}; {options.steps} updates of {options.batch_size}; {device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| trained | seconds | weights, MiB | val_loss | KID |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def samples(folder: Path) -> ImageSet:
    """What sample.py drew there."""
    return sample_set(folder, ("AD", "NC"))


def held_out_loss(folder: Path) -> float:
    """The last val_loss of a run."""
    with (folder / "metrics.csv").open() as file:
        return [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]][-1]


if __name__ == "__main__":
    main()
