"""Draw slices of the class asked for.

    python sample.py --class AD --num_images 64 --model runs/ldm --output_dir samples
    python sample.py --class all --num_inference_steps 20 --scheduler dpm++ --guidance_scale 3
    accelerate launch sample.py --num_images 100000 --batch_size 256        # shared among the GPUs
    python sample.py --from_image scan.png --from NC --to AD        # a real slice, as it would look in AD
    python sample.py --morph 9 --from NC --to AD                    # one brain from NC to AD in 9 frames

Writes samples/AD/000000.png …, and at the end metadata.csv (an `imagefolder` again), grid.png and, with
--trajectory, trajectory.png. Image k of a class starts from the same noise in every class. A run that was
stopped goes on by the same command line, on as many processes as you like: the pictures are the same.
--from_image writes counterfactual.png, difference.png, side_by_side.png and metadata.csv; --morph writes
morph.png and morph.gif.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import to_pil_image
from tqdm.auto import tqdm

from adni_ldm.config import SampleConfig, parse_config
from adni_ldm.counterfactual import write_counterfactual, write_morph
from adni_ldm.environment import processes_without_gpu
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import save_rows
from adni_ldm.generation import (
    denoising_trajectory,
    generate_images,
    hash_pipeline,
    image_seed,
    use_scheduler,
)
from adni_ldm.loading import load_pipeline
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.precision import choose_precision

PREVIEW = 16  # slices of each class in grid.png
SETTINGS = ".settings.json"  # what the folder's slices are; hidden, since the folder is a data set


def main() -> None:
    cfg = parse_config(SampleConfig, __doc__)
    output_dir = Path(cfg.output_dir)

    # ---- Processes and model -------------------------------------------------------------------------------
    precision = choose_precision(cfg.mixed_precision)
    # the first to end waits for the last one, whose share may take long
    state = PartialState(cpu=processes_without_gpu(), timeout=timedelta(hours=24))
    pipeline = load_pipeline(cfg.model)
    labels = chosen_labels(pipeline, cfg.class_labels)
    use_scheduler(pipeline, cfg.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(state.device)

    # ---- A real slice in another class, or a brain on its way there: that and nothing else -----------------
    options = {"num_inference_steps": cfg.num_inference_steps, "guidance_scale": cfg.guidance_scale}
    if cfg.from_image and state.is_main_process:
        options["strength"] = cfg.strength
        row = write_counterfactual(output_dir, pipeline, cfg.from_image, cfg.source, cfg.target, **options)
        print(
            f"{output_dir}/side_by_side.png: mean difference {row['difference']:.4f} of the grey range, "
            f"mean round-trip error {row['round_trip_error']:.4f}; read nothing where the error reaches"
        )
    if cfg.morph and state.is_main_process:
        options |= {"seed": image_seed(cfg.seed, 0), "frames": cfg.morph}
        write_morph(output_dir, pipeline, cfg.source, cfg.target, **options)
        print(f"{cfg.morph} frames in {output_dir}/morph.png and morph.gif")
    if cfg.from_image or cfg.morph:
        return

    # ---- Folder: empty, or of a run with the same settings -------------------------------------------------
    options = {
        "num_inference_steps": cfg.num_inference_steps,
        "guidance_scale": cfg.guidance_scale,
        "eta": cfg.eta,
    }
    options["guidance_interval"] = tuple(cfg.guidance_interval)
    columns = {
        "num_inference_steps": cfg.num_inference_steps,
        "guidance_scale": cfg.guidance_scale,
        "eta": cfg.eta,
    }
    columns |= {
        "scheduler": cfg.scheduler,
        "precision": precision,
        "model": cfg.model,
        "model_hash": hash_pipeline(pipeline),
        "data_hash": "+".join(data["hash"] for data in pipeline.unet.config.get("_trained_on", ())),
        "guidance_interval": " ".join(map(str, cfg.guidance_interval)),
    }
    settings = {name: value for name, value in columns.items() if name != "model"}
    settings |= {"class": list(labels.values()), "seed": cfg.seed}
    settings |= {"num_images": cfg.num_images, "batch_size": cfg.batch_size}
    refuse_other_run(output_dir, settings)
    state.wait_for_everyone()  # until all have looked
    if state.is_main_process:
        open_folder(output_dir, labels.values(), settings)
    state.wait_for_everyone()

    # ---- Draw: batches of fixed slices, dealt out to the processes -----------------------------------------
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
            if not all(path.is_file() for path in paths):
                # a batch is drawn whole: the rounding of its slices depends on their number
                seeds = [image_seed(cfg.seed, index) for index in indices]
                drawn = generate_images(
                    pipeline, [label] * len(seeds), seeds, len(seeds), precision, **options
                )
                (images,) = drawn  # (B, 1, H, W)
                list(written)  # the batch before is on the disk, or its error is raised here
                written = writers.map(write_png, images, paths)
            progress.update(len(indices))
        list(written)
    progress.close()
    state.wait_for_everyone()

    # ---- What was drawn, and how ---------------------------------------------------------------------------
    if state.is_main_process:
        write_metadata(output_dir, labels.values(), cfg.num_images, cfg.seed, columns)
        first_ones = range(min(PREVIEW, cfg.num_images))
        rows = {
            name: torch.stack([read_png(output_dir / file_name(name, index)) for index in first_ones])
            for name in labels.values()
        }
        save_rows(output_dir / "grid.png", rows, columns=8)
        if cfg.trajectory:
            rows = {
                name: denoising_trajectory(
                    pipeline, label, image_seed(cfg.seed, 0), frames=9, precision=precision, **options
                )
                for label, name in labels.items()
            }
            save_rows(output_dir / "trajectory.png", rows)
        print(f"{len(labels) * cfg.num_images} slices in {output_dir}; grid.png shows them")
    state.wait_for_everyone()
    state.destroy_process_group()


def chosen_labels(pipeline: ClassConditionalLDMPipeline, classes: str) -> dict[int, str]:
    """{label: name} of "AD", "0", a comma list, or "all".

    Raises:
        UserError: a class that the model does not know.
    """
    names = list(pipeline.class_embedding.config.class_names)
    try:
        labels = (
            range(len(names)) if classes == "all" else pipeline.class_embedding.labels_of(classes.split(","))
        )
    except ValueError as error:
        raise UserError(f"--class {classes}: {error}") from error
    return {label: names[label] for label in labels}


def refuse_other_run(folder: Path, settings: Mapping[str, object]) -> None:
    """Refuse a folder with anything but the slices, or a part of them, that these settings draw.

    Raises:
        UserError: with each setting that differs.
    """
    path = folder / SETTINGS
    if path.is_file():
        earlier = json.loads(path.read_text())
        different = [
            f"{name} was {earlier.get(name)}, is {value}"
            for name, value in settings.items()
            if earlier.get(name) != value
        ]
        if different:
            raise UserError(
                f"--output_dir {folder} holds slices of other settings: {'; '.join(different)}. "
                "Give those, remove the folder, or choose another"
            )
    elif folder.exists() and (
        not folder.is_dir() or any(inside.name != f"{SETTINGS}.partial" for inside in folder.iterdir())
    ):
        raise UserError(f"--output_dir {folder} is not empty: remove it or choose another")


def open_folder(folder: Path, names: Iterable[str], settings: Mapping[str, object]) -> None:
    """Make the folders and note the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{SETTINGS}.partial"
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(partial, folder / SETTINGS)
    for name in names:
        (folder / name).mkdir(exist_ok=True)


def file_name(class_name: str, index: int) -> str:
    """Where image `index` of a class lies in the folder."""
    return f"{class_name}/{index:06d}.png"


def write_png(image: torch.Tensor, path: Path) -> None:
    """Write a slice (1, H, W) in [0, 1], whole or not at all; one that is there stays as it is.

    What a kill left half written has the name that is written to here.
    """
    if not path.is_file():
        partial = path.with_name(f".{path.name}.partial")
        to_pil_image(image).save(partial, format="png")
        os.replace(partial, path)


def read_png(path: Path) -> torch.Tensor:
    """The slice (1, H, W) in [0, 1] that was written."""
    return decode_image(str(path), ImageReadMode.GRAY) / 255


def write_metadata(
    folder: Path, names: Iterable[str], num_images: int, seed: int, columns: Mapping[str, object]
) -> None:
    """metadata.csv with a line a slice, written line by line."""
    partial = folder / ".metadata.csv.partial"
    with partial.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["file_name", "label", "seed", *columns])
        for name in names:
            for index in range(num_images):
                lines.writerow([file_name(name, index), name, image_seed(seed, index), *columns.values()])
    os.replace(partial, folder / "metadata.csv")


if __name__ == "__main__":
    run_recipe(main)
