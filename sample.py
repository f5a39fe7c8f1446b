"""Sample slices conditioned on diagnosis.

    python sample.py --class AD --num_images 64 --model runs/ldm --output_dir samples
    python sample.py --class all --num_inference_steps 20 --scheduler dpm++ --guidance_scale 3
    accelerate launch sample.py --num_images 100000 --batch_size 256    # distributed over the GPUs
    python sample.py --from_image scan.png --from NC --to AD            # counterfactual of a real slice
    python sample.py --from_image scan.png --from NC --to age=85 --conditions age=70    # the same class at 85
    python sample.py --morph 9 --from NC --to AD                        # class interpolation in 9 frames
    python sample.py --class all --sweep age=55:90:8                    # one brain at 8 ages, in each class

Writes samples/AD/000000.png …, metadata.csv (the folder is an `imagefolder`), grid.png and, with
--trajectory, trajectory.png. Image k of every class has the same initial noise. The same command continues an
interrupted run, on any number of processes, with the same images.
--from_image writes counterfactual.png, difference.png, side_by_side.png and metadata.csv; --morph writes
morph.png and morph.gif; --sweep writes samples with sweep.png and sweep.gif in place of grid.png.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from tqdm.auto import tqdm

from adni_ldm.config import SampleConfig, parse_config
from adni_ldm.counterfactual import write_counterfactual, write_morph
from adni_ldm.data.cells import escape_table
from adni_ldm.data.conditions import asked_conditions, matched_conditions, swept_conditions
from adni_ldm.data.provenance import model_records
from adni_ldm.data.sample_folder import (
    SETTINGS,
    check_same_run,
    file_name,
    is_whole,
    save_grid,
    save_sweep,
    write_png,
)
from adni_ldm.data.slices import open_folder
from adni_ldm.environment import processes_without_gpu
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.files import atomic_file, remove_leftovers, write_json
from adni_ldm.generation import (
    denoising_trajectory,
    generate_images,
    hash_pipeline,
    image_seed,
    is_extrapolated,
    use_scheduler,
)
from adni_ldm.loading import load_pipeline
from adni_ldm.output_lock import OutputLock
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.precision import choose_precision


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
    swept = swept_conditions(cfg.sweep, cfg.conditions) if cfg.sweep else {}
    count = max(map(len, swept.values()), default=cfg.num_images)
    # A sweep is one brain: its images differ in the condition, and have the noise of image 0 at every step.
    seeds = [image_seed(cfg.seed, 0 if swept else index) for index in range(count)]
    conditions = choose_conditions(cfg, pipeline, labels.values(), swept, count)
    columns = record_settings(cfg, pipeline, options | {"scheduler": cfg.scheduler, "precision": precision})
    options |= {"guidance_interval": tuple(cfg.guidance_interval), "decoder_noise": columns["decoder_noise"]}
    settings = {name: value for name, value in columns.items() if name != "model"}
    settings |= {"class": list(labels.values()), "seed": cfg.seed}
    settings |= {"num_images": count, "batch_size": cfg.batch_size}
    if any(conditions.values()):
        settings |= {"conditions": conditions, "guide_conditions": cfg.guide_conditions, "sweep": cfg.sweep}
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
        (label, range(count)[first : first + cfg.batch_size])
        for label in labels
        for first in range(0, count, cfg.batch_size)
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
                size, batch = len(indices), slice(indices.start, indices.stop)
                asked = {name: values[batch] for name, values in conditions[labels[label]].items()}
                (images,) = generate_images(
                    pipeline, [label] * size, seeds[batch], size, precision, conditions=asked, **options
                )
                list(written)  # wait for the previous batch; an error while writing is raised here
                written = writers.map(write_png, images, paths)  # images: (B, 1, H, W)
            progress.update(len(indices))
        list(written)
    progress.close()
    state.wait_for_everyone()

    # ---- Metadata and figures ----------------------------------------------------------------------------
    if state.is_main_process:
        write_metadata(output_dir, pipeline, conditions, seeds, columns)
        for name, values in swept.items():
            save_sweep(output_dir, labels.values(), name, values)
        if not swept:
            save_grid(output_dir, labels.values(), count)
        if cfg.trajectory:
            save_trajectories(output_dir, pipeline, labels, conditions, seeds[0], precision, options)
        lock.release()
        print(f"{len(labels) * count} slices in {output_dir}; see {'sweep' if swept else 'grid'}.png")
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


def record_settings(
    cfg: SampleConfig, pipeline: ClassConditionalLDMPipeline, settings: Mapping[str, object]
) -> dict[str, object]:
    """The columns of metadata.csv that all samples share: these settings, and the model that they are of."""
    return {
        **settings,
        "model": cfg.model,
        "model_hash": hash_pipeline(pipeline),
        "data_hash": "+".join(dict.fromkeys(data["hash"] for data in model_records(pipeline.components))),
        "guidance_interval": " ".join(map(str, cfg.guidance_interval)),
        "decoder_noise": pipeline.config.decoder_noise if cfg.decoder_noise is None else cfg.decoder_noise,
    }


def choose_conditions(
    cfg: SampleConfig,
    pipeline: ClassConditionalLDMPipeline,
    class_names: Iterable[str],
    swept: Mapping[str, list[str]],
    count: int,
) -> dict[str, dict[str, list[str]]]:
    """{class: {condition: a value for each image}} of --conditions, --sweep or --match; {class: {}} without.

    Raises UserError for a condition that the model does not have, or a value that it was not trained on.
    """
    names, embedding = list(class_names), pipeline.condition_embedding
    flag = "match" if cfg.match else "sweep" if swept else "conditions"
    if cfg.conditions or cfg.match or swept:
        check_conditioned(cfg, pipeline, f"--{flag}")
    if cfg.match:
        every = pipeline.class_embedding.config.class_names
        try:
            listing = open_folder(cfg.match, every, cfg.table, embedding.names)
        except UserError as error:  # of a column that the folder lacks
            raise UserError(f"--match {cfg.match}: {error}") from error
        found = matched_conditions(listing, cfg.match_split, count, cfg.seed)
    else:
        found = dict.fromkeys(names, asked_conditions(cfg.conditions, count) | swept)
    for name in names if embedding else ():
        try:
            embedding.rows_of(found[name], count, cfg.extrapolate)
        except ValueError as error:
            raise UserError(f"--{flag}: {error}") from error
    return {name: found[name] for name in names}


def check_conditioned(cfg: SampleConfig, pipeline: ClassConditionalLDMPipeline, flag: str) -> None:
    """Check that the model has conditions, which `flag` asks for, else UserError."""
    if pipeline.condition_embedding is None:
        raise UserError(f"--model {cfg.model}: it was trained without conditions; leave out {flag}")


def write_transition(
    cfg: SampleConfig, output_dir: Path, pipeline: ClassConditionalLDMPipeline, options: Mapping[str, object]
) -> str:
    """Write the counterfactual of --from_image or the class interpolation of --morph; returns a summary."""
    if cfg.conditions or "=" in (cfg.target or ""):
        check_conditioned(cfg, pipeline, "--conditions" if cfg.conditions else f"--to {cfg.target}")
    asked = {name: value for name, (value,) in asked_conditions(cfg.conditions, 1).items()}
    options = {**options, "conditions": asked, "extrapolate": cfg.extrapolate}
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


def save_trajectories(
    folder: Path,
    pipeline: ClassConditionalLDMPipeline,
    labels: Mapping[int, str],
    conditions: Mapping[str, Mapping[str, list[str]]],
    seed: int,
    precision: str,
    options: Mapping[str, object],
) -> None:
    """Save trajectory.png: the denoising of the first slice of each class {label: name}."""
    rows = {}
    for label, name in labels.items():
        first = {condition: values[0] for condition, values in conditions[name].items()}
        rows[name] = denoising_trajectory(pipeline, label, seed, 9, precision, **options, conditions=first)
    save_rows(folder / "trajectory.png", rows)


def write_metadata(
    folder: Path,
    pipeline: ClassConditionalLDMPipeline,
    conditions: Mapping[str, Mapping[str, list[str]]],
    seeds: Sequence[int],
    columns: Mapping[str, object],
) -> None:
    """Write metadata.csv, one row per slice, with a column for each condition that was asked for."""
    rows = []
    for name, asked in conditions.items():
        for index, seed in enumerate(seeds):
            row = {"file_name": file_name(name, index), "label": name, "seed": seed}
            one = {condition: values[index] for condition, values in asked.items()}
            marks = {"extrapolated": is_extrapolated(pipeline, one)} if asked else {}
            rows.append({**row, **one, **marks, **columns})
    with atomic_file(folder / "metadata.csv") as partial:
        escape_table(pd.DataFrame(rows)).to_csv(partial, index=False, lineterminator="\n")


if __name__ == "__main__":
    run_recipe(main)
