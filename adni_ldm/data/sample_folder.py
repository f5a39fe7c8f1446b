"""The folder that sample.py writes: slices of each class, and the settings that they were sampled with."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from adni_ldm.errors import UserError
from adni_ldm.figures import save_film, save_rows, to_pil
from adni_ldm.files import atomic_file, check_empty_dir, read_json

SETTINGS = ".settings.json"  # settings of the slices in the folder; hidden, since the folder is a data set
PREVIEW = 16  # slices of each class in grid.png
# Columns of metadata.csv, which say how a slice was sampled; those of conditions are beside them.
SAMPLE_COLUMNS = ("file_name", "label", "seed", "num_inference_steps", "guidance_scale", "eta", "scheduler")
SAMPLE_COLUMNS += ("precision", "model", "model_hash", "data_hash", "guidance_interval", "decoder_noise")
SAMPLE_COLUMNS += ("extrapolated",)


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
        f"{name} was {earlier.get(name)}, is {settings.get(name)}"
        for name in {**settings, **earlier}  # those that only one of them has, too: --conditions, --sweep
        if earlier.get(name) != settings.get(name)
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
    """Save grid.png with the first slices of each class, of `count`."""
    save_rows(folder / "grid.png", _read_rows(folder, names, min(count, PREVIEW)), columns=8)


def save_sweep(folder: Path, names: Iterable[str], condition: str, values: Sequence[str]) -> None:
    """Save the slices of each class, one for each value of a condition: sweep.png and sweep.gif."""
    rows = _read_rows(folder, names, len(values))
    save_rows(folder / "sweep.png", rows, headings=[f"{condition} {values[0]}", *values[1:]])
    save_film(folder / "sweep.gif", torch.cat(list(rows.values()), dim=-1))  # the classes side by side


def _read_rows(folder: Path, names: Iterable[str], count: int) -> dict[str, torch.Tensor]:
    """The first `count` slices of each class, (count, 1, H, W) in [0, 1]."""
    rows = {}
    for name in names:
        paths = [str(folder / file_name(name, index)) for index in range(count)]
        rows[name] = torch.stack([decode_image(path, ImageReadMode.GRAY) for path in paths]) / 255
    return rows
