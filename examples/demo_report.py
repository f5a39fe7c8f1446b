"""Last step of `make demo`: a figure of samples and a page of metrics.

    python examples/demo_report.py runs/demo

Reads data/, vae/, ldm/ and samples/ in that folder; writes brains.png and summary.md to it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch

from adni_ldm.data.manifest import read_manifest
from adni_ldm.data.slices import SliceTensors, evenly_spaced, load_slices, to_arrays
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.evaluation.anatomy import ventricle_area
from adni_ldm.evaluation.effects import cohens_d
from adni_ldm.evaluation.image_sets import load_samples
from adni_ldm.figures import save_rows
from adni_ldm.loading import load_autoencoder

COLUMNS = 10  # slices in a row of the figure


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    for part in ("data", "vae", "ldm", "samples"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: no such folder; run the steps of `make demo` before this one")
    vae = load_autoencoder(str(folder / "vae"))
    splits = load_slices(folder / "data")
    real = SliceTensors(to_arrays(splits["test"], vae.config.sample_size))
    pixel_mm = pd.read_csv(folder / "data/test/metadata.csv").pixel_mm[0]
    names = splits["test"].features["label"].names
    sample_set = load_samples(folder / "samples", names)
    samples = {name: sample_set.of_class(name).floats() for name in names}

    save_figure(folder / "brains.png", vae, real, samples)
    page = summarize(folder, splits, real, names, samples, pixel_mm)
    (folder / "summary.md").write_text(page)
    print(page)
    print(f"figures: {folder}/brains.png, {folder}/samples/grid.png, {folder}/samples/trajectory.png")
    print(f"metrics: {folder}/summary.md, {folder}/vae/loss.png, {folder}/ldm/loss.png")
    data, samples, model = (folder / part for part in ("data", "samples", "ldm"))
    print(f"evaluate: python evaluate.py --real {data} --samples {samples} --model {model}")


@torch.no_grad()
def save_figure(path: Path, vae, real: SliceTensors, samples: dict[str, torch.Tensor]) -> None:
    """Rows of held-out slices, of their reconstructions, and of samples of each class."""
    indices = evenly_spaced(len(real), COLUMNS)
    images = torch.stack([real[index]["image"] for index in indices])
    reconstructed = vae.decode(vae.encode(images).latent_dist.mean).sample
    rows = {"real": images, "reconstructed": reconstructed}
    rows |= {f"sampled: {name}": images[:COLUMNS] for name, images in samples.items()}
    save_rows(path, {title: (row / 2 + 0.5).clamp(0, 1) for title, row in rows.items()})


def summarize(folder: Path, splits, real: SliceTensors, names, samples, pixel_mm: float) -> str:
    """The page, in Markdown. Areas are measured in the slices, real and sampled alike."""
    vae, ldm = (pd.read_csv(folder / part / "metrics.csv") for part in ("vae", "ldm"))
    images = torch.stack([real[index]["image"] for index in range(len(real))])
    areas = {
        f"{source}, {name}": ventricle_area(slices, pixel_mm)
        for label, name in enumerate(names)
        for source, slices in (("real, held out", images[real.labels == label]), ("sampled", samples[name]))
    }
    subjects = ", ".join(f"{len(set(part['subject']))} {split}" for split, part in splits.items())
    lines = [
        "# Metrics of the demo",
        "",
        "| metric | value |",
        "| --- | --- |",
        f"| data | {read_manifest(folder / 'data')['hash'][:16]} |",
        f"| subjects | {subjects} |",
        f"| VAE, held-out PSNR | {vae.val_psnr.dropna().iloc[-1]:.1f} dB |",
        f"| VAE, held-out SSIM | {vae.val_ssim.dropna().iloc[-1]:.3f} |",
        f"| LDM, held-out loss | {ldm.val_loss.dropna().iloc[-1]:.4f} |",
    ]
    lines += [
        f"| lateral ventricle, {title} (n = {len(area)}) | {area.mean():.0f} ± {area.std(ddof=1):.0f} mm² |"
        for title, area in areas.items()
    ]
    for source in ("real, held out", "sampled"):
        groups = (areas[f"{source}, {name}"] for name in names[:2])
        effect = cohens_d(*((group.mean(), group.std(ddof=1)) for group in groups))
        lines.append(f"| effect of {names[0]} on the ventricle, {source} | Cohen's d = {effect:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_recipe(main)
