"""Sample slices conditioned on diagnosis.

    python sample.py --class AD --num_images 64 --model runs/ldm --output_dir samples
    python sample.py --class all --num_inference_steps 20 --scheduler dpm++ --guidance_scale 3
    accelerate launch sample.py --num_images 100000 --batch_size 256    # distributed over the GPUs
    python sample.py --from_image scan.png --from NC --to AD            # counterfactual of a real slice
    python sample.py --morph 9 --from NC --to AD                        # class interpolation in 9 frames

Writes samples/AD/000000.png …, metadata.csv (the folder is an `imagefolder`), grid.png and, with
--trajectory, trajectory.png. Image k of every class has the same initial noise. The same command continues an
interrupted run, on any number of processes, with the same images.
--from_image writes counterfactual.png, difference.png, side_by_side.png and metadata.csv; --morph writes
morph.png and morph.gif.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from tqdm.auto import tqdm

from adni_ldm.config import SampleConfig, parse_config
from adni_ldm.counterfactual import write_counterfactual, write_morph
from adni_ldm.data.cells import escape_table
from adni_ldm.data.conditions import asked_conditions, matched_conditions
from adni_ldm.data.provenance import model_records
from adni_ldm.data.slices import open_folder
from adni_ldm.environment import processes_without_gpu
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import save_rows, to_pil
from adni_ldm.files import atomic_file, check_empty_dir, read_json, remove_leftovers, write_json
from adni_ldm.generation import (
    denoising_trajectory,
    generate_images,
    hash_pipeline,
    image_seed,
    use_scheduler,
)
from adni_ldm.loading import load_pipeline
from adni_ldm.output_lock import OutputLock
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.precision import choose_precision

PREVIEW = 16  # slices of each class in grid.png
SETTINGS = ".settings.json"  # settings of the slices in the folder; hidden, since the folder is a data set


def main() -> None:
    cfg = parse_config(SampleConfig, __doc__)
    output_dir = Path(cfg.output_dir)

    # ---- Processes and model -----------------------------------------------------------------------------
    precision = choose_precision(cfg.mixed_precision)
    # The first process to end waits for the last one, which may take long.
    state = PartialState(cpu=processes_without_gpu(), timeout=timedelta(hours=24))
    pipeline = load_pipeline(cfg.model)
    labels = class_labels(pipeline, cfg.class_labels)
    use_scheduler(pipeline, cfg.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(state.device)
    options = pipeline.sampling_settings(cfg.num_inference_steps, cfg.guidance_scale, cfg.eta)

    # ---- Counterfactual or class interpolation instead of samples ----------------------------------------
    if cfg.from_image or cfg.morph:
        del options["eta"]  # inversion is deterministic
        if state.is_main_process:
            print(write_transition(cfg, output_dir, pipeline, options))
        return

    # ---- Output folder: empty, or of a run with the same settings ----------------------------------------
    columns = {
        **options,
        "scheduler": cfg.scheduler,
        "precision": precision,
        "model": cfg.model,
        "model_hash": hash_pipeline(pipeline),
        "data_hash": "+".join(dict.fromkeys(data["hash"] for data in model_records(pipeline.components))),
        "guidance_interval": " ".join(map(str, cfg.guidance_interval)),
        "decoder_noise": pipeline.config.decoder_noise if cfg.decoder_noise is None else cfg.decoder_noise,
    }
    options["guidance_interval"] = tuple(cfg.guidance_interval)
    options["decoder_noise"] = columns["decoder_noise"]
    settings = {name: value for name, value in columns.items() if name != "model"}
    settings |= {"class": list(labels.values()), "seed": cfg.seed}
    settings |= {"num_images": cfg.num_images, "batch_size": cfg.batch_size}
    conditions = choose_conditions(cfg, pipeline, labels.values())
    if any(conditions.values()):
        settings |= {"conditions": conditions, "guide_conditions": cfg.guide_conditions}
        options |= {"guide_conditions": cfg.guide_conditions, "extrapolate": cfg.extrapolate}
    check_same_run(output_dir, settings)
    state.wait_for_everyone()  # all processes check before one of them writes
    if state.is_main_process:
        lock = OutputLock(output_dir)
        write_json(output_dir / SETTINGS, settings)
        for name in labels.values():
            (output_dir / name).mkdir(exist_ok=True)
            remove_leftovers(output_dir / name)
    state.wait_for_everyone()

    # ---- Sampling: batches of fixed slices, distributed over the processes -------------------------------
    batches = [
        (label, range(first, min(first + cfg.batch_size, cfg.num_images)))
        for label in labels
        for first in range(0, cfg.num_images, cfg.batch_size)
    ]
    share = batches[state.process_index :: state.num_processes]
    progress = tqdm(
        total=sum(len(indices) for _, indices in share),
        desc="sampling" if state.num_processes == 1 else f"sampling, process 1 of {state.num_processes}",
        unit="slice",
        disable=not state.is_main_process,
    )
    with ThreadPoolExecutor() as writers:
        written: Iterable = ()
        for label, indices in share:
            paths = [output_dir / file_name(labels[label], index) for index in indices]
            if not all(map(is_whole, paths)):
                # The whole batch is sampled again: rounding depends on the batch size.
                seeds = [image_seed(cfg.seed, index) for index in indices]
                size = len(seeds)
                asked = {
                    name: [values[index] for index in indices]
                    for name, values in conditions[labels[label]].items()
                }
                (images,) = generate_images(
                    pipeline, [label] * size, seeds, size, precision, conditions=asked, **options
                )
                list(written)  # wait for the previous batch; an error while writing is raised here
                written = writers.map(write_png, images, paths)  # images: (B, 1, H, W)
            progress.update(len(indices))
        list(written)
    progress.close()
    state.wait_for_everyone()

    # ---- Metadata and figures ----------------------------------------------------------------------------
    if state.is_main_process:
        write_metadata(output_dir, pipeline, conditions, cfg.num_images, cfg.seed, columns)
        save_grid(output_dir, labels.values(), min(PREVIEW, cfg.num_images))
        if cfg.trajectory:
            first = {"seed": image_seed(cfg.seed, 0), "frames": 9, "precision": precision}
            rows = {
                name: denoising_trajectory(pipeline, label, **first, **options, conditions=first_of(asked))
                for (label, name), asked in zip(labels.items(), conditions.values())
            }
            save_rows(output_dir / "trajectory.png", rows)
        lock.release()
        print(f"{len(labels) * cfg.num_images} slices in {output_dir}; preview in grid.png")
    state.wait_for_everyone()
    state.destroy_process_group()


def class_labels(pipeline: ClassConditionalLDMPipeline, classes: str) -> dict[int, str]:
    """Return {label: name} for "AD", "0", a comma list, or "all".

    Raises:
        UserError: a class that the model does not have.
    """
    embedding = pipeline.class_embedding
    names = list(embedding.config.class_names)
    try:
        labels = range(len(names)) if classes == "all" else embedding.labels_of(classes.split(","))
    except ValueError as error:
        raise UserError(f"--class {classes}: {error}") from error
    return {label: names[label] for label in labels}


def choose_conditions(
    cfg: SampleConfig, pipeline: ClassConditionalLDMPipeline, class_names: Iterable[str]
) -> dict[str, dict[str, list[str]]]:
    """{class: {condition: a value for each image}} of --conditions or --match; {class: {}} without them.

    Raises UserError for a condition that the model does not have, or a value that it was not trained on.
    """
    names, embedding = list(class_names), pipeline.condition_embedding
    if (cfg.conditions or cfg.match) and embedding is None:
        raise UserError(f"--model {cfg.model}: it was trained without conditions; leave out --conditions")
    if cfg.match:
        every = pipeline.class_embedding.config.class_names
        listing = open_folder(cfg.match, every, cfg.table, embedding.names)
        found = matched_conditions(listing, cfg.match_split, cfg.num_images, cfg.seed)
    else:
        found = dict.fromkeys(names, asked_conditions(cfg.conditions, cfg.num_images))
    for name in names if embedding else ():
        try:
            embedding.rows_of(found[name], cfg.num_images, cfg.extrapolate)
        except ValueError as error:
            raise UserError(f"--{'match' if cfg.match else 'conditions'}: {error}") from error
    return {name: found[name] for name in names}


def first_of(conditions: Mapping[str, list[str]]) -> dict[str, str]:
    """The conditions of the first image."""
    return {name: values[0] for name, values in conditions.items()}


def write_transition(
    cfg: SampleConfig, output_dir: Path, pipeline: ClassConditionalLDMPipeline, options: Mapping[str, object]
) -> str:
    """Write the counterfactual of --from_image or the class interpolation of --morph; returns a summary."""
    if cfg.morph:
        options = {**options, "seed": image_seed(cfg.seed, 0), "frames": cfg.morph}
        write_morph(output_dir, pipeline, cfg.source, cfg.target, **options)
        return f"{cfg.morph} frames in {output_dir}/morph.png and morph.gif"
    options = {**options, "strength": cfg.strength}
    row = write_counterfactual(output_dir, pipeline, cfg.from_image, cfg.source, cfg.target, **options)
    return (
        f"{output_dir}/side_by_side.png: mean difference {row['difference']:.4f} of the intensity range, "
        f"mean round-trip error {row['round_trip_error']:.4f}; differences below the error are no evidence"
    )


def check_same_run(folder: Path, settings: Mapping[str, object]) -> None:
    """Check that a folder is empty, or holds slices of these settings.

    Raises:
        UserError: it holds something else; the message names each setting that differs.
    """
    if not (folder / SETTINGS).is_file():
        check_empty_dir(folder)
        return
    earlier = read_json(folder / SETTINGS)
    different = [
        f"{name} was {earlier.get(name)}, is {value}"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]
    if different:
        raise UserError(
            f"--output_dir {folder} holds slices of other settings: {'; '.join(different)}. "
            "Use the same settings, remove the folder, or choose another"
        )


def file_name(class_name: str, index: int) -> str:
    """Return the path of image `index` of a class, relative to the output folder."""
    return f"{class_name}/{index:06d}.png"


def is_whole(path: Path) -> bool:
    """Whether a slice is there and can be decoded: a power cut may leave a file of another program empty."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write a slice (1, H, W) in [0, 1] atomically; a whole one that exists is kept."""
    if not is_whole(path):
        with atomic_file(path) as partial:
            to_pil(image).save(partial, format="png")


def save_grid(folder: Path, names: Iterable[str], count: int) -> None:
    """Save grid.png with the first `count` slices of each class."""
    rows = {}
    for name in names:
        paths = [str(folder / file_name(name, index)) for index in range(count)]
        rows[name] = torch.stack([decode_image(path, ImageReadMode.GRAY) for path in paths]) / 255
    save_rows(folder / "grid.png", rows, columns=8)


def write_metadata(
    folder: Path,
    pipeline: ClassConditionalLDMPipeline,
    conditions: Mapping[str, Mapping[str, list[str]]],
    num_images: int,
    seed: int,
    columns: Mapping[str, object],
) -> None:
    """Write metadata.csv, one row per slice, with a column for each condition that was asked for."""
    rows = []
    for name, asked in conditions.items():
        for index in range(num_images):
            row = {"file_name": file_name(name, index), "label": name, "seed": image_seed(seed, index)}
            one = {condition: values[index] for condition, values in asked.items()}
            marks = {"extrapolated": is_extrapolated(pipeline, one)} if asked else {}
            rows.append({**row, **one, **marks, **columns})
    with atomic_file(folder / "metadata.csv") as partial:
        escape_table(pd.DataFrame(rows)).to_csv(partial, index=False, lineterminator="\n")


def is_extrapolated(pipeline: ClassConditionalLDMPipeline, conditions: Mapping[str, str]) -> bool:
    """Whether a condition of one image is outside of its range in training."""
    try:
        pipeline.condition_embedding.rows_of(conditions, 1)
    except ValueError:
        return True
    return False


if __name__ == "__main__":
    run_recipe(main)
