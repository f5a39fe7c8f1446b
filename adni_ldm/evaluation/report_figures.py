"""The figures that a report shows, with their captions; `figures` draws them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adni_ldm.data.slices import evenly_spaced
from adni_ldm.evaluation import figures
from adni_ldm.evaluation.estimates import Estimate
from adni_ldm.evaluation.image_sets import ImageSet, thin
from adni_ldm.evaluation.model_outputs import bottleneck_features, reconstruct
from adni_ldm.evaluation.privacy import Memorization
from adni_ldm.evaluation.report import FigureFolder
from adni_ldm.figures import save_rows
from adni_ldm.files import read_json
from adni_ldm.generation import denoising_trajectory, image_seed
from adni_ldm.pipeline import ClassConditionalLDMPipeline


def plot_comparisons(
    folder: FigureFolder,
    held_out: ImageSet,
    train: ImageSet,
    samples: ImageSet,
    memorization: Memorization,
    guidance_curve: Mapping[float, Estimate] | None,
) -> None:
    """Slices, the difference of the classes, nearest training slices, and accuracy by guidance scale."""
    path = folder.add("figures", "slices", "Held-out real slices and samples, by class")
    figures.save_real_beside_samples(path, held_out, samples)
    caption = (
        "Difference between the mean slices of the first and the last class, in real slices and in samples"
    )
    figures.save_class_difference(folder.add("anatomy", "class_difference", caption), held_out, samples)
    caption = (
        "The ten samples nearest to a training slice, that slice, and the difference after alignment. "
        "Subjects are numbered within this figure"
    )
    path = folder.add("privacy", "nearest_pairs", caption)
    figures.save_pairs(path, memorization.pairs, samples, train)
    caption = "Distance ratio to the nearest training slice, for samples and for held-out real slices"
    path = folder.add("privacy", "distances", caption)
    neighbors = memorization.samples, memorization.held_out
    figures.save_nearest_histogram(path, *(one.ratios for one in neighbors), memorization.rule)
    if guidance_curve:
        path = folder.add("conditioning", "guidance", "Class-conditioning accuracy by guidance scale")
        figures.save_guidance_curve(path, guidance_curve)


def plot_model(
    folder: FigureFolder,
    pipeline: ClassConditionalLDMPipeline,
    model: str,
    held_out: ImageSet,
    samples: ImageSet,
    sampling: Mapping,
    seed: int,
) -> None:
    """Denoising, reconstructions, the U-Net's bottleneck, and the loss curves in the folder `model`.

    Args:
        sampling: further arguments of the pipeline's call.
    """
    path = folder.add("figures", "denoising", "Denoising from the same noise, for each class")
    rows = {
        name: denoising_trajectory(pipeline, label, image_seed(seed, 0), frames=9, **sampling)
        for label, name in enumerate(held_out.class_names)
    }
    save_rows(path, rows)

    path = folder.add("figures", "reconstructions", "Reconstructions of held-out slices by the autoencoder")
    some = held_out.take(evenly_spaced(len(held_out), 8))
    figures.save_reconstructions(path, some, reconstruct(pipeline.vae, some))

    if pipeline.unet.mid_block is not None:  # some distilled U-Nets have none
        path = folder.add("figures", "bottleneck", "UMAP of the U-Net's bottleneck features, by class")
        chosen = [part.take(thin(part.subjects, 300, seed)) for part in (held_out, samples)]
        features = [(bottleneck_features(pipeline, part, seed=seed), part) for part in chosen]
        figures.save_umap(path, "UMAP of U-Net bottleneck features", *features, seed=seed)

    for title, run in _run_folders(Path(model)).items():
        path = folder.add("figures", f"loss_{title}", f"Training curves of the {title}")
        path.write_bytes((run / "loss.png").read_bytes())


def _run_folders(model: Path) -> dict[str, Path]:
    """Run folders with loss curves: of the diffusion model, and of its autoencoder if it still exists."""
    found = {"diffusion model": model}
    if (model / "training_config.json").is_file():
        found["autoencoder"] = Path(read_json(model / "training_config.json").get("vae") or "")
    return {title: folder for title, folder in found.items() if (folder / "loss.png").is_file()}
