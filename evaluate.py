"""Evaluate samples against real slices: fidelity, TSTR, class conditioning, anatomy and memorization.

    python evaluate.py --real data/phantom --samples samples --output_dir report --model runs/ldm

Compares samples with real slices of subjects that the model was not trained on. Writes report.html (one page
that needs no other file), metrics.json (every metric with its 95 % confidence interval and its reference: the
value that real slices of other subjects reach in the samples' place) and figures/. Works offline; the same
seed gives the same metrics. Exits with status 4 if --require names a question whose verdict is not
favourable. Needs the extra `eval`: pip install 'adni-ldm[eval]'.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

if missing := [name for name in ("scipy", "umap") if find_spec(name) is None]:
    sys.exit(f"evaluate.py: error: {missing[0]} is not installed: pip install 'adni-ldm[eval]'")

from adni_ldm.config import EvaluateConfig, class_names, parse_config
from adni_ldm.data.folder import IMAGE_FORMATS, SUBJECTS_UNKNOWN
from adni_ldm.data.hub_datasets import as_folder
from adni_ldm.data.provenance import describe_data
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.environment import installed_versions
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.evaluation import figures
from adni_ldm.evaluation.anatomy import measure_anatomy
from adni_ldm.evaluation.classifier import train_classifier
from adni_ldm.evaluation.conditioning import (
    class_conditioning_accuracy,
    class_conditioning_accuracy_by_guidance,
)
from adni_ldm.evaluation.covariates import adjusted_effects, condition_faithfulness, describe_real
from adni_ldm.evaluation.effects import compare_anatomy
from adni_ldm.evaluation.features import load_extractor
from adni_ldm.evaluation.fidelity import fidelity
from adni_ldm.evaluation.history import (
    History,
    check_held_out,
    find_model,
    open_cohorts,
    read_history,
    sampled_with,
)
from adni_ldm.evaluation.image_sets import (
    ImageSet,
    conditions_asked,
    generate_image_set,
    join,
    load_samples,
    read_sample_table,
    real_set,
    thin,
)
from adni_ldm.evaluation.model_outputs import reconstruct
from adni_ldm.evaluation.privacy import measure_memorization
from adni_ldm.evaluation.questions import QUESTIONS, list_verdicts
from adni_ldm.evaluation.report import FigureFolder, write_html, write_metrics
from adni_ldm.evaluation.report_figures import plot_comparisons, plot_model
from adni_ldm.evaluation.spectrum import measure_spectra
from adni_ldm.evaluation.tstr import train_on_synthetic_test_on_real
from adni_ldm.evaluation.verdicts import verdicts
from adni_ldm.files import CONTENT_PARTIAL, atomic_content, check_empty_dir
from adni_ldm.generation import hash_pipeline
from adni_ldm.loading import load_pipeline
from adni_ldm.output_lock import OutputLock
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.precision import choose_precision


def main() -> int:
    cfg = parse_config(EvaluateConfig, __doc__)
    if unknown := set(cfg.require) - set(QUESTIONS):
        known = ", ".join(QUESTIONS)
        raise UserError(f"--require {','.join(sorted(unknown))}: no such question; the questions are {known}")
    output_dir = Path(cfg.output_dir)
    # An earlier report is replaced, or one that a kill interrupted, and nothing else.
    if not any((output_dir / name).exists() for name in ("metrics.json", CONTENT_PARTIAL)):
        check_empty_dir(output_dir)
    lock = OutputLock(output_dir)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    # ---- Samples, real slices and the model ----------------------------------------------------------------
    names = class_names(cfg.classes)
    table = read_sample_table(cfg.samples)
    folder = as_folder(cfg.real, names, **cfg.dataset_options)
    listing = open_folder(folder, names, cfg.table)
    if asked := conditions_asked(table, listing.columns):
        listing = open_folder(folder, names, cfg.table, asked)
    samples = load_samples(cfg.samples, names, cfg.max_slices, table[asked])
    size = samples.images.shape[-1]
    splits = read_slices(listing, cfg.val_fraction)
    data, metadata = describe_data(listing, splits), sampled_with(table)
    pipeline = open_pipeline(cfg.model, metadata, names, size)
    history = find_history(cfg.model, pipeline, metadata, cfg.samples)
    also = [as_folder(folder, names, **cfg.dataset_options) for folder in cfg.also_trained_on]
    others = open_cohorts(also, history, names, cfg.table, cfg.val_fraction, size)
    check_held_out(history, data, others)
    unseen = history.unseen({data.hash, *(cohort.data.hash for cohort in others)})
    print(f"the model's training data: {history.describe(unseen)}")
    if pipeline:
        pipeline.to(device)
    real = {split: real_set(slices, size) for split, slices in splits.items()}
    # Memorization is searched for in every training slice of the model that is at hand.
    all_train = [cohort.train for cohort in others]
    if not others or data.hash in history.hashes or history.unknown:
        all_train = [real["train"], *all_train]
    all_train = reduce(join, all_train)
    test = real.get("test", real["val"])
    held_out = join(real["val"], test) if "test" in real else test
    train, held_out = (
        part.take(thin(part.subjects, cfg.max_slices, cfg.seed)) for part in (real["train"], held_out)
    )
    print(f"{len(samples)} samples; {len(train)} training and {len(held_out)} held-out real slices")

    # ---- Classifier, features and anatomy ------------------------------------------------------------------
    training = {"seed": cfg.seed, "device": device, "steps": cfg.classifier_steps}
    classifier = train_classifier(train, **training, description="Training a classifier on real slices")
    vae = pipeline.vae if pipeline else None
    extract = load_extractor(cfg.features, classifier=classifier, vae=vae, device=device)
    features = [extract(images) for images in (held_out, train, samples)]
    pixel_mm = cfg.pixel_mm or find_pixel_mm(listing.root, size)
    # Anatomy of all real slices: nothing was fitted to it, and more subjects give narrower intervals.
    all_real = join(train, held_out)
    about = describe_real(all_real)  # of the conditions that samples were asked for
    anatomy = [measure_anatomy(images.floats(), pixel_mm, progress=True) for images in (all_real, samples)]

    # ---- Metrics -------------------------------------------------------------------------------------------
    sampling = {"num_inference_steps": cfg.curve_steps, "precision": choose_precision(None)}
    conditioning = {"class_conditioning_accuracy": class_conditioning_accuracy(classifier, samples, held_out)}
    if pipeline and cfg.curve_images:

        def generate(guidance_scale: float) -> ImageSet:
            options = {"guidance_scale": guidance_scale, **sampling}
            return generate_image_set(pipeline, cfg.curve_images, cfg.seed, **options)

        conditioning["by_guidance"] = class_conditioning_accuracy_by_guidance(
            classifier, generate, cfg.guidance_scales, held_out
        )
    memorization = measure_memorization(samples, all_train, held_out, pipeline, seed=cfg.seed, about=about)
    reconstructions = reconstruct(vae, held_out) if vae else None
    metrics = {
        "fidelity": fidelity(held_out, train, samples, features, seed=cfg.seed),
        "spectrum": measure_spectra(held_out, samples, reconstructions, cfg.seed),
        "tstr": train_on_synthetic_test_on_real(
            classifier, train, samples, held_out, **training, about=about
        ),
        "conditioning": conditioning,
        "anatomy": compare_anatomy(all_real, anatomy[0], samples, anatomy[1], cfg.seed),
        "privacy": {**memorization.metrics, "unseen_cohorts": unseen},
    }
    if about:
        metrics["conditions"] = {
            **condition_faithfulness(about, train, samples, held_out, **training),
            "effects": adjusted_effects(about, all_real, anatomy[0], samples, anatomy[1], cfg.seed),
        }

    # ---- Report --------------------------------------------------------------------------------------------
    facts = {
        "subjects_known": data.subjects_known,
        "model_hash": hash_pipeline(pipeline) if pipeline else metadata.get("model_hash"),
        "data_hash": data.hash,
        "training_data": history.describe(unseen),
        "features": {"name": extract.name, "hash": extract.hash},
        "copy_rule": str(memorization.rule) if memorization.rule else None,
        "pixel_mm": pixel_mm,
        "seed": cfg.seed,
        "sampled_with": metadata,
        "slices": {name: len(part) for name, part in (*real.items(), ("samples", samples))},
        "subjects": {name: len(set(part.subjects)) for name, part in real.items()},
        "versions": installed_versions(("adni-ldm", "torch", "diffusers", "torchvision")),
    }
    metrics = {"verdicts": verdicts(metrics), **metrics, **facts}
    with atomic_content(output_dir, last="metrics.json") as partial:
        folder = FigureFolder(partial / "figures")
        curve = conditioning.get("by_guidance")
        plot_comparisons(folder, held_out, all_train, samples, memorization, curve)
        caption = "Distribution of the anatomical measures by class, in real slices and in samples"
        path = folder.add("anatomy", "anatomy", caption)
        figures.save_anatomy(path, all_real, anatomy[0], samples, anatomy[1])
        caption = (
            "Power of held-out slices and samples by spatial frequency, and of reconstructions with --model"
        )
        curves = {"held-out real slices": held_out.floats(), "samples": samples.floats()}
        curves |= {} if reconstructions is None else {"reconstructions": reconstructions}
        figures.save_spectrum(folder.add("spectrum", "spectrum", caption), curves)
        caption = f"UMAP of the features ({extract.name}) of real slices and samples, by class"
        path = folder.add("fidelity", "features", caption)
        title = f"UMAP of {extract.name} features"
        figures.save_umap(path, title, (features[0], held_out), (features[2], samples), seed=cfg.seed)
        if pipeline:
            plot_model(folder, pipeline, cfg.model, held_out, samples, sampling, cfg.seed)
        write_metrics(partial / "metrics.json", metrics)
        write_html(partial / "report.html", metrics, folder.figures, describe(facts))
    lock.release()
    for verdict in list_verdicts(metrics):
        print(f"{verdict.question} {verdict.answer}. {verdict.text}")
    print(f"report: {output_dir}/report.html")
    lacking = [name for name in cfg.require if metrics["verdicts"][name]["good"] is not True]
    if lacking:
        print(f"--require: the verdict is not favourable on {', '.join(lacking)}", file=sys.stderr)
    return 4 if lacking else 0


def find_history(
    name: str | None,
    pipeline: ClassConditionalLDMPipeline | None,
    metadata: Mapping[str, str],
    samples: str,
) -> History:
    """What is known of the data that the samples' model was trained on.

    Without --model it is the pipeline that metadata.csv names, if that exists and has the weights that
    generated the samples.
    """
    if name:
        return read_history(name, pipeline)
    named = metadata.get("model", "")
    if not (folder := find_model(named, samples)):
        missing = "the model that metadata.csv names was not found" if named else "the samples name no model"
        return read_history(named, None, f"{missing}; give --model")
    found = load_pipeline(str(folder))
    if metadata.get("model_hash") != hash_pipeline(found):
        return read_history(named, None, "the model that metadata.csv names has changed; give --model")
    return read_history(str(folder), found)


def open_pipeline(
    name: str | None, metadata: Mapping[str, str], names: tuple[str, ...], size: int
) -> ClassConditionalLDMPipeline | None:
    """The pipeline that generated the samples; None without --model.

    Raises:
        UserError: it has other classes or another image size, or did not generate the samples.
    """
    if name is None:
        return None
    pipeline = load_pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    if pipeline.class_embedding.config.class_names != list(names):
        known = ",".join(pipeline.class_embedding.config.class_names)
        raise UserError(f"--model {name}: has the classes {known}; give --classes {known}")
    model_size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    if model_size != size:
        raise UserError(f"--model {name}: generates slices of {model_size} pixels, the samples have {size}")
    found = hash_pipeline(pipeline)
    if metadata.get("model_hash", found) != found:
        raise UserError(
            f"--model {name} did not generate these samples: the hash of its weights is {found}, that in "
            f"metadata.csv {metadata['model_hash']}; sample again with sample.py"
        )
    return pipeline


def find_pixel_mm(root: Path, size: int) -> float:
    """Side of a pixel, mm, at `size` pixels: from the data's metadata.csv, else 256 mm over the side."""
    for path in sorted(root.glob("*/metadata.csv")):
        table = pd.read_csv(path)
        if "pixel_mm" in table and len(table):
            with Image.open(path.parent / table.file_name[0], formats=IMAGE_FORMATS) as image:
                return float(table.pixel_mm[0]) * max(image.size) / size
    return 256 / size


def describe(facts: Mapping) -> dict[str, str]:
    """What was compared, as the page shows it."""
    counts = ", ".join(
        f"{facts['subjects'][name]} subjects in {name} ({facts['slices'][name]} slices)"
        for name in facts["subjects"]
    )
    settings = [f"{name.replace('_', ' ')} {value}" for name, value in facts["sampled_with"].items()]
    versions = [f"{name} {version}" for name, version in facts["versions"].items()]
    features = facts["features"]
    unknown = "" if facts["subjects_known"] else f"; {SUBJECTS_UNKNOWN}, and the intervals are too narrow"
    return {
        "Real slices": f"{counts}; data hash {facts['data_hash'][:16]}{unknown}",
        "Samples": ", ".join([str(facts["slices"]["samples"]), *(settings or ["no metadata.csv"])]),
        "Model's training data": facts["training_data"],
        "Features": f"{features['name']}, hash of the weights {features['hash']}; metrics of different "
        "features are not comparable",
        "Definition of a copy": facts["copy_rule"] or "no threshold could be set",
        "Computed with": ", ".join([f"seed {facts['seed']}", *versions]),
    }


if __name__ == "__main__":
    run_recipe(main)
