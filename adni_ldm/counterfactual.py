"""What sample.py writes instead of samples: the counterfactual of a slice, and a class interpolation."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch

from adni_ldm.data.cells import escape_table, unescape_table
from adni_ldm.data.slices import prepare_image, read_image, to_float
from adni_ldm.errors import UserError
from adni_ldm.figures import (
    colour_limit,
    difference_image,
    save_counterfactual,
    save_film,
    save_rows,
    to_pil,
)
from adni_ldm.files import atomic_folder, check_empty_dir
from adni_ldm.generation import hash_pipeline, interpolate_classes, is_extrapolated
from adni_ldm.pipeline import ClassConditionalLDMPipeline, Counterfactual


def make_counterfactual(
    pipeline: ClassConditionalLDMPipeline, pixels: torch.Tensor, source: str, target: str, **options
) -> Counterfactual:
    """Generate the counterfactual of one slice (H, W), uint8, of the model's size; float32 on the CPU.

    `options` are those of `pipeline.counterfactual`. Raises UserError for a class or a condition that the
    model does not have, or an option out of range.
    """
    try:
        result = pipeline.counterfactual(to_float(pixels)[None, None], source, target, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Counterfactual(*(part.float().cpu() for part in result))


def write_counterfactual(
    output_dir: Path,
    pipeline: ClassConditionalLDMPipeline,
    image: str,
    source: str | None,
    target: str,
    conditions: Mapping[str, str],
    extrapolate: bool = False,
    **options,
) -> dict[str, object]:
    """Write the counterfactual of the image file `image`: three PNGs and metadata.csv.

    `target` is another class, or NAME=VALUE of a condition, which keeps the class. `source` is the class of
    the slice, by default that of the metadata.csv beside it, and `conditions` its own. Returns the row of
    metadata.csv; `difference` and `round_trip_error` are means of absolute differences, as fractions of the
    intensity range. Raises UserError if the file is not an image, its class is unknown or the folder is not
    empty, and as `make_counterfactual`.
    """
    check_empty_dir(output_dir)
    source = source or class_in_metadata(Path(image))
    size = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pixels = torch.tensor(prepare_image(read_image(image), size))  # (H, W)
    changed_name, is_condition, value = target.partition("=")
    if not is_condition:
        check_target(pipeline, target)
    elif not (changed_name and value.strip()):
        raise UserError(f"--to {target}: give NAME=VALUE, such as age=85")
    asked = {"conditions": conditions, "extrapolate": extrapolate}
    asked["target_conditions"] = {changed_name: value} if is_condition else {}
    result = make_counterfactual(
        pipeline, pixels, source, source if is_condition else target, **asked, **options
    )

    limit = colour_limit(result.difference)
    classes = f"{source} to {target}"
    row = {"file_name": "counterfactual.png", "from_image": image, "from": source, "to": target}
    row |= {**conditions, **options}
    if pipeline.condition_embedding is not None:
        row["extrapolated"] = is_extrapolated(pipeline, {**conditions, **asked["target_conditions"]})
    row |= {"difference": float(result.difference.abs().mean()), "colour_limit": limit}
    row |= {"round_trip_error": float(result.error.mean()), "round_trip_error_max": float(result.error.max())}
    row["model_hash"] = hash_pipeline(pipeline)
    with atomic_folder(output_dir) as folder:
        to_pil(result.images[0] / 2 + 0.5).save(folder / "counterfactual.png")
        difference_image(result.difference[0], limit).save(folder / "difference.png")
        save_counterfactual(folder / "side_by_side.png", to_float(pixels)[None], result, classes)
        escape_table(pd.DataFrame([row])).to_csv(folder / "metadata.csv", index=False)
    return row


def check_target(pipeline: ClassConditionalLDMPipeline, target: str) -> None:
    """Check that `target` is a class of the model, else UserError with the classes and the conditions."""
    try:
        pipeline.class_embedding.labels_of(target)
    except ValueError as error:
        embedding = pipeline.condition_embedding
        other = f", and its conditions, for --to NAME=VALUE, {embedding.describe()}" if embedding else ""
        raise UserError(f"--to {target}: {error}{other}") from error


def class_in_metadata(image: Path) -> str:
    """Read the class of a slice from the metadata.csv of its folder or the one above, else UserError."""
    for folder in image.absolute().parents[:2]:
        if (folder / "metadata.csv").is_file():
            table = unescape_table(pd.read_csv(folder / "metadata.csv", dtype=str))
            if {"file_name", "label"} <= set(table):
                name = image.absolute().relative_to(folder).as_posix()
                if len(labels := table.label[table.file_name == name]):
                    return labels.iloc[0]
    raise UserError(f"--from_image {image}: no metadata.csv lists its class; give it, such as --from NC")


def write_morph(
    output_dir: Path, pipeline: ClassConditionalLDMPipeline, source: str, target: str, **options
) -> None:
    """Write a class interpolation from `source` to `target`: its frames side by side and back and forth.

    `options` are those of `interpolate_classes`. Raises UserError for a class or condition that the model
    does not have, or a folder that is not empty.
    """
    check_empty_dir(output_dir)
    try:
        frames = interpolate_classes(pipeline, source, target, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    with atomic_folder(output_dir) as folder:
        save_rows(folder / "morph.png", {f"{source} to {target}": frames})
        save_film(folder / "morph.gif", frames)
