"""What sample.py writes beside samples: a real slice in another class, and a brain on its way there."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from torchvision.transforms.functional import to_pil_image

from adni_ldm.data.slices import prepare_image, read_image, to_float
from adni_ldm.errors import UserError
from adni_ldm.figures import colour_limit, difference_picture, save_counterfactual, save_rows
from adni_ldm.generation import hash_pipeline, interpolate_classes
from adni_ldm.pipeline import ClassConditionalLDMPipeline, Counterfactual


def redraw(
    pipeline: ClassConditionalLDMPipeline, pixels: torch.Tensor, source: str, target: str, **options
) -> Counterfactual:
    """The counterfactual, on the CPU in float32, of one slice (H, W), uint8, of the pipeline's size.

    Raises:
        UserError: a class that the model does not know, or an option out of range.
    """
    given = to_float(pixels[None, None])  # (1, 1, H, W), [-1, 1]
    try:
        result = pipeline.counterfactual(given, source, target, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Counterfactual(*(part.float().cpu() for part in result))


def write_counterfactual(
    output_dir: Path,
    pipeline: ClassConditionalLDMPipeline,
    image: str,
    source: str | None,
    target: str,
    **options,
) -> dict[str, object]:
    """Redraw the picture file `image` in the class `target`: three PNGs and a line of metadata.csv.

    Args:
        source: class of the picture; None asks the metadata.csv beside it.
        options: `strength`, `num_inference_steps` and `guidance_scale` of the pipeline's counterfactual.

    Returns:
        what metadata.csv says; `difference` and `round_trip_error` are means, in shares of the grey range.

    Raises:
        UserError: no such picture, its class is not known, the folder is not empty, or as `redraw`.
    """
    refuse_full(output_dir)
    source = source or class_in_metadata(Path(image))
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    pixels = torch.tensor(prepare_image(read_image(image), side))  # (H, W)
    result = redraw(pipeline, pixels, source, target, **options)

    output_dir.mkdir(parents=True, exist_ok=True)
    limit = colour_limit(result)
    to_pil_image(result.images[0] / 2 + 0.5).save(output_dir / "counterfactual.png")
    difference_picture(result.difference[0], limit).save(output_dir / "difference.png")
    given = to_float(pixels[None])
    save_counterfactual(output_dir / "side_by_side.png", given, result, f"{source} to {target}")
    row = {"file_name": "counterfactual.png", "from_image": image, "from": source, "to": target, **options}
    row |= {"difference": float(result.difference.abs().mean()), "colour_limit": limit}
    row |= {"round_trip_error": float(result.error.mean()), "round_trip_error_max": float(result.error.max())}
    row["model_hash"] = hash_pipeline(pipeline)
    pd.DataFrame([row]).to_csv(output_dir / "metadata.csv", index=False)
    return row


def refuse_full(output_dir: Path) -> None:
    """Raises UserError for a folder that holds something."""
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"--output_dir {output_dir} is not empty: remove it or choose another")


def class_in_metadata(image: Path) -> str:
    """Class of a slice by the metadata.csv of its folder, or of the folder above.

    Raises:
        UserError: none names it.
    """
    for folder in image.absolute().parents[:2]:
        if (folder / "metadata.csv").is_file():
            table = pd.read_csv(folder / "metadata.csv", dtype=str)
            if {"file_name", "label"} <= set(table):
                name = image.absolute().relative_to(folder).as_posix()
                if len(labels := table.label[table.file_name == name]):
                    return labels.iloc[0]
    raise UserError(f"--from_image {image}: no metadata.csv says its class; give it, such as --from NC")


def write_morph(
    output_dir: Path, pipeline: ClassConditionalLDMPipeline, source: str, target: str, **options
) -> None:
    """One seed from the class `source` to `target`: a strip, and a film that goes there and back.

    Args:
        options: further arguments of `interpolate_classes`.

    Raises:
        UserError: a class that the model does not know, or a folder that is not empty.
    """
    refuse_full(output_dir)
    try:
        frames = interpolate_classes(pipeline, source, target, **options)
    except ValueError as error:
        raise UserError(str(error)) from error
    output_dir.mkdir(parents=True, exist_ok=True)
    save_rows(output_dir / "morph.png", {f"{source} to {target}": frames})
    film = [to_pil_image(frame) for frame in frames]
    film += film[-2:0:-1]
    film[0].save(output_dir / "morph.gif", save_all=True, append_images=film[1:], duration=120, loop=0)
