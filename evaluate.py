"""Say what samples are worth: fidelity, usefulness, faithfulness to the class, anatomy, and privacy.

    python evaluate.py --real data/phantom --samples samples --output_dir report --model runs/ldm

Compares samples with real slices of subjects that nothing was trained on. Writes report.html (one page that
needs no other file), metrics.json (each figure with its 95 % interval and its floor: what other real people's
slices reach) and figures/. Works offline; the same seed gives the same figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from adni_ldm.config import EvaluateConfig, class_names, parse_config
from adni_ldm.data.provenance import DataRecord, check_leakage, describe_data
from adni_ldm.data.slices import evenly_spaced, open_folder, read_slices
from adni_ldm.environment import installed_versions
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.evaluation import figures
from adni_ldm.evaluation.anatomy import measure_anatomy
from adni_ldm.evaluation.classifier import train_classifier
from adni_ldm.evaluation.conditioning import agreement, agreement_by_guidance
from adni_ldm.evaluation.effects import compare_anatomy
from adni_ldm.evaluation.features import load_extractor
from adni_ldm.evaluation.fidelity import fidelity
from adni_ldm.evaluation.image_sets import ImageSet, generate_image_set, join, load_samples, real_set, thin
from adni_ldm.evaluation.model_outputs import bottleneck_features, reconstruct
from adni_ldm.evaluation.privacy import examine
from adni_ldm.evaluation.report import Gallery, write_metrics, write_page
from adni_ldm.evaluation.tstr import usefulness
from adni_ldm.evaluation.verdicts import verdicts
from adni_ldm.figures import save_rows
from adni_ldm.generation import denoising_trajectory, hash_pipeline, image_seed
from adni_ldm.loading import load_pipeline
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.precision import choose_precision


def main() -> None:
    cfg = parse_config(EvaluateConfig, __doc__)
    output_dir = Path(cfg.output_dir)
    refuse_other_folder(output_dir)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    # ---- What is compared ----------------------------------------------------------------------------------
    names = class_names(cfg.classes)
    samples = load_samples(cfg.samples, names, cfg.max_slices)
    size = samples.images.shape[-1]
    scan = open_folder(cfg.real, names, cfg.table)
    splits = read_slices(scan, cfg.val_fraction)
    data, drawn = describe_data(scan, splits), sample_facts(cfg.samples)
    refuse_leaks(cfg.model, drawn, data)
    pipeline = open_pipeline(cfg.model, drawn, names, size)
    real = {split: real_set(slices, size) for split, slices in splits.items()}
    everyone_trained_on = real["train"]  # privacy looks at all of them; the rest at so many
    test, unseen = real["val"], real["val"]
    if "test" in real:
        test, unseen = real["test"], join(real["val"], real["test"])
    train, test, unseen = (
        part.take(thin(part.subjects, cfg.max_slices, cfg.seed))
        for part in (everyone_trained_on, test, unseen)
    )
    print(f"{len(samples)} samples; real slices: {len(train)} for training, {len(unseen)} of unseen people")

    # ---- Judge and features --------------------------------------------------------------------------------
    options = {"seed": cfg.seed, "device": device, "steps": cfg.classifier_steps}
    judge = train_classifier(train, **options, description="training a classifier on real slices")
    if pipeline:
        pipeline.to(device)
    extract = load_extractor(
        cfg.features, classifier=judge, vae=pipeline.vae if pipeline else None, device=device
    )
    compared = (unseen, train, samples)
    features = [extract(images) for images in compared]
    pixel_mm = cfg.pixel_mm or find_pixel_mm(scan.root, size)
    anatomy = [measure_anatomy(images.floats(), pixel_mm, progress=True) for images in (unseen, samples)]

    # ---- The questions -------------------------------------------------------------------------------------
    faithfulness = {"agreement": agreement(judge, samples, test)}
    if pipeline and cfg.curve_images:

        def draw(guidance_scale: float) -> ImageSet:
            options = {"num_inference_steps": cfg.curve_steps, "precision": choose_precision(None)}
            options["guidance_scale"] = guidance_scale
            return generate_image_set(pipeline, cfg.curve_images, cfg.seed, **options)

        faithfulness["by_guidance"] = agreement_by_guidance(judge, draw, cfg.guidance_scales, test)
    privacy = examine(samples, everyone_trained_on, unseen, pipeline=pipeline, seed=cfg.seed)
    questions = {
        "fidelity": fidelity(*compared, features, seed=cfg.seed),
        "usefulness": usefulness(judge, train, samples, test, **options),
        "faithfulness": faithfulness,
        "anatomy": compare_anatomy(unseen, anatomy[0], samples, anatomy[1], cfg.seed),
        "privacy": privacy.figures,
    }

    # ---- Pictures ------------------------------------------------------------------------------------------
    gallery = Gallery(output_dir / "figures")
    draw_comparisons(gallery, unseen, everyone_trained_on, samples, anatomy, questions, privacy)
    shown = (features[0], unseen), (features[2], samples)
    path = gallery.add(
        "fidelity",
        "features",
        f"The slices by their features ({extract.name}), near where they are alike (UMAP)",
    )
    figures.save_umap(path, f"features of {extract.name}", *shown, seed=cfg.seed)
    if pipeline:
        draw_insides(gallery, pipeline, unseen, samples, cfg)

    # ---- The report ----------------------------------------------------------------------------------------
    facts = {
        "model_hash": hash_pipeline(pipeline) if pipeline else drawn.get("model_hash"),
        "data_hash": data.hash,
        "features": {"name": extract.name, "hash": extract.hash},
        "copy_rule": str(privacy.rule) if privacy.rule else None,
        "pixel_mm": pixel_mm,
        "seed": cfg.seed,
        "sampled_with": drawn,
        "slices": {name: len(part) for name, part in (*real.items(), ("samples", samples))},
        "subjects": {name: len(set(part.subjects)) for name, part in real.items()},
        "versions": installed_versions(("adni-ldm", "torch", "diffusers", "torchvision")),
    }
    metrics = {"verdicts": verdicts(questions), **questions, **facts}
    write_metrics(output_dir / "metrics.json", metrics)
    write_page(output_dir / "report.html", metrics, gallery.pictures, in_words(facts))
    for verdict in metrics["verdicts"].values():
        print({True: "yes", False: "no ", None: "?  "}[verdict["good"]], verdict["text"])
    print(f"report: {output_dir}/report.html")


def refuse_other_folder(output_dir: Path) -> None:
    """A report is written over an earlier one, and over nothing else."""
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        if not (output_dir / "metrics.json").is_file():
            raise UserError(f"--output_dir {output_dir} is not empty and holds no report: choose another")


def sample_facts(folder: str) -> dict[str, str]:
    """Which model, data and settings the samples' metadata.csv names; empty without one."""
    path = Path(folder) / "metadata.csv"
    if not path.is_file():
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); sample.py writes it") from error
    columns = ("model", "model_hash", "data_hash", "guidance_scale", "num_inference_steps", "scheduler")
    return {name: ", ".join(sorted(set(table[name]))) for name in columns if name in table}


def refuse_leaks(model: str | None, drawn: Mapping[str, str], data: DataRecord) -> None:
    """Refuse real data of which the model was trained on somebody who is held out here.

    Asks the configs of --model, or of the folder that the samples' metadata.csv names if it is still there.
    """
    folder = Path(model or drawn.get("model", ""))
    for part in ("vae", "unet"):
        config = folder / part / "config.json"
        if config.is_file():
            check_leakage(str(folder), json.loads(config.read_text()).get("_trained_on"), data)


def open_pipeline(
    name: str | None, drawn: Mapping[str, str], names: tuple[str, ...], size: int
) -> ClassConditionalLDMPipeline | None:
    """The model that drew the samples.

    Raises:
        UserError: it draws other classes or sizes, or did not draw them.
    """
    if name is None:
        return None
    pipeline = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.class_embedding.config.class_names != list(names):
        known = ",".join(pipeline.class_embedding.config.class_names)
        raise UserError(f"--model {name}: draws {known}; give --classes {known}")
    drawn_size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if drawn_size != size:
        raise UserError(f"--model {name}: draws slices of {drawn_size} pixels, the samples have {size}")
    found = hash_pipeline(pipeline)
    if drawn.get("model_hash", found) != found:
        raise UserError(
            f"--model {name} did not generate these samples: the hash of its weights is {found}, that in "
            f"metadata.csv {drawn['model_hash']}; sample again with sample.py"
        )
    return pipeline


def find_pixel_mm(root: Path, size: int) -> float:
    """Side of a pixel, mm, at `size` pixels: from the data's metadata.csv, else 256 mm over the side."""
    for path in sorted(root.glob("*/metadata.csv")):
        table = pd.read_csv(path)
        if "pixel_mm" in table and len(table):
            with Image.open(path.parent / table.file_name[0]) as image:
                return float(table.pixel_mm[0]) * max(image.size) / size
    return 256 / size


def draw_comparisons(
    gallery: Gallery, unseen: ImageSet, train: ImageSet, samples: ImageSet, anatomy, questions, privacy
) -> None:
    """Pictures that need no model."""
    path = gallery.add("pictures", "slices", "Real slices of unseen people, and samples, by class")
    figures.save_real_beside_samples(path, unseen, samples)
    path = gallery.add(
        "anatomy", "class_difference", "What sets the first class apart: mean picture minus mean of the last"
    )
    figures.save_class_difference(path, unseen, samples)
    path = gallery.add("anatomy", "anatomy", "Measures of the anatomy by class, real and synthetic")
    figures.save_anatomy(path, unseen, anatomy[0], samples, anatomy[1])
    path = gallery.add(
        "privacy",
        "nearest_pairs",
        "The ten samples that come nearest to a training slice. People are numbered, not named",
    )
    figures.save_pairs(path, privacy.pairs, samples, train)
    path = gallery.add("privacy", "distances", "How near samples and other people's slices come to training")
    figures.save_nearest_histogram(path, privacy.samples.ratios, privacy.held_out.ratios, privacy.rule)
    if curve := questions["faithfulness"].get("by_guidance"):
        path = gallery.add(
            "faithfulness", "guidance", "Share of samples taken for the class asked for, by guidance scale"
        )
        figures.save_guidance_curve(path, curve)


def draw_insides(
    gallery: Gallery,
    pipeline: ClassConditionalLDMPipeline,
    unseen: ImageSet,
    samples: ImageSet,
    cfg: EvaluateConfig,
) -> None:
    """Pictures of the model itself."""
    path = gallery.add("pictures", "denoising", "One brain of each class coming out of the same noise")
    options = {"num_inference_steps": cfg.curve_steps, "precision": choose_precision(None)}
    labels = range(len(unseen.class_names))
    rows = [
        denoising_trajectory(pipeline, label, image_seed(cfg.seed, 0), frames=9, **options)
        for label in labels
    ]
    save_rows(path, dict(zip(unseen.class_names, rows)))

    path = gallery.add("pictures", "reconstructions", "What the autoencoder keeps of unseen people's slices")
    some = unseen.take(evenly_spaced(len(unseen), 8))
    figures.save_reconstructions(path, some, reconstruct(pipeline.vae, some))

    path = gallery.add("pictures", "bottleneck", "The slices as the U-Net's middle sees them (UMAP)")
    chosen = [part.take(thin(part.subjects, 300, cfg.seed)) for part in (unseen, samples)]
    shown = [(bottleneck_features(pipeline, part, seed=cfg.seed), part) for part in chosen]
    figures.save_umap(path, "the U-Net's bottleneck", *shown, seed=cfg.seed)

    for title, folder in run_folders(Path(cfg.model)).items():
        path = gallery.add("pictures", f"loss_{title}", f"Loss curves of the {title}")
        path.write_bytes((folder / "loss.png").read_bytes())


def run_folders(model: Path) -> dict[str, Path]:
    """Runs that left loss curves: the diffusion model, and its autoencoder if that is still there."""
    found = {"diffusion model": model}
    if (model / "training_config.json").is_file():
        vae = json.loads((model / "training_config.json").read_text()).get("vae")
        found["autoencoder"] = Path(vae or "")
    return {title: folder for title, folder in found.items() if (folder / "loss.png").is_file()}


def in_words(facts: Mapping) -> dict[str, str]:
    """The facts as the page shows them."""
    counts = ", ".join(
        f"{facts['subjects'][name]} subjects in {name} ({facts['slices'][name]} slices)"
        for name in facts["subjects"]
    )
    return {
        "Real": f"{counts}; data {facts['data_hash'][:16]}",
        "Samples": f"{facts['slices']['samples']}, "
        + (", ".join(f"{name} {text}" for name, text in facts["sampled_with"].items()) or "without metadata"),
        "Features": "{name}, weights {hash}; figures of other features must not be compared".format(
            **facts["features"]
        ),
        "Rule for copies": facts["copy_rule"] or "none could be set",
        "Made with": f"seed {facts['seed']}, "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
    }


if __name__ == "__main__":
    run_recipe(main)
