"""Slices for training: from a folder of images to uint8 arrays on disk and tensors in [-1, 1].

    slices = load_slices("ADNI/AD_NC")             # columns image (PIL), label, subject, scan, slice
    arrays = to_arrays(slices["train"], 256)       # image: uint8 (256, 256), made once, then memory-mapped
    loader = DataLoader(SliceTensors(arrays), 16)  # image: float32 (16, 1, 256, 256) in [-1, 1]; label: (16,)

See folder.py for the layout of the folder, and for the problems that are raised.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import (
    Array2D,
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    load_dataset,
)
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from adni_ldm.data.archives import cache_dir, open_data_dir
from adni_ldm.data.folder import IMAGE_FORMATS, FolderListing, SliceFile, list_folder
from adni_ldm.data.manifest import manifest_problems
from adni_ldm.data.splits import SPLITS, DataError, choose_val_subjects

CLASS_NAMES = ("AD", "NC")
CONDITION = "condition: "  # before the names of columns of conditions

MOST_SIDE = 4096  # pixels; images are untrusted, and a thin one is padded to a square

# Part of the cache keys of prepared slices and latents. The datasets library hashes a function by name, not
# by code: increase this number with every change in what prepare_image returns.
PREPARATION_VERSION = 1


def load_slices(
    data_dir: str | Path,
    *,
    val_fraction: float = 0.1,
    class_names: Sequence[str] = CLASS_NAMES,
    table: str | Path | None = None,
) -> DatasetDict:
    """Load the splits train, val and, if there is one, test of {train,val,test}/{AD,NC}/SUBJECT_SLICE.png.

    Args:
        data_dir: the folder that holds train/, a parent of it, or a zip of either, which is unpacked into the
            cache of Hugging Face datasets.
        val_fraction: of the subjects of train, for validation without a val/ folder; always the same
            subjects.
        table: the study table in which image IDs are looked up to find their subjects.

    Returns:
        columns image (datasets.Image, decoded to PIL), label (ClassLabel: index into `class_names`), subject,
        scan (strings), slice (int64).

    Raises:
        UserError: the folder cannot be trained on; `check_folder` lists all its problems.
    """
    return read_slices(open_folder(data_dir, class_names, table), val_fraction)


def open_folder(
    data_dir: str | Path,
    class_names: Sequence[str] = CLASS_NAMES,
    table: str | Path | None = None,
    conditions: Sequence[str] = (),
) -> FolderListing:
    """List a folder or zip, and compare it with its manifest.json; `conditions` as of `list_folder`."""
    listing = list_folder(open_data_dir(data_dir), class_names, table, conditions)
    listing.problems += manifest_problems(listing)
    return listing


def read_slices(listing: FolderListing, val_fraction: float = 0.1) -> DatasetDict:
    """Load the slices of a listed folder; see `load_slices`. Raises DataError if it has problems."""
    listing.raise_problems()

    # Few patterns rather than 30,000 paths, made from the listing, so that both have the same files.
    patterns: dict[str, list[str]] = {}
    for file in listing.files:
        path = Path(file.path)
        pattern = f"{glob.escape(path.parent.as_posix())}/*{path.suffix}"
        if pattern not in patterns.setdefault(file.split, []):
            patterns[file.split].append(pattern)
    options = {"drop_labels": True, "drop_metadata": True, "cache_dir": str(cache_dir("slices"))}
    loaded = load_dataset("imagefolder", data_files=patterns, **options)
    by_path = {file.path: file for file in listing.files}
    splits = {split: _add_columns(dataset, by_path, listing.class_names) for split, dataset in loaded.items()}

    if "val" not in splits:
        splits["train"], splits["val"] = _split_off_val(splits["train"], val_fraction, listing.root)
    return DatasetDict({split: splits[split] for split in SPLITS if split in splits})


def read_image(path: str | Path) -> PILImage.Image:
    """Read an image file completely, with its EXIF orientation applied. Raises DataError naming the file."""
    try:
        with PILImage.open(path, formats=IMAGE_FORMATS) as image:
            if max(image.size) > MOST_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels, too many for a slice")
            image.load()
            if image.mode == "LAB":
                raise ValueError("LAB colours, which PIL cannot convert to grey")
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image despite its name; copy it again or remove it") from error
    except Exception as error:  # of a damaged file PIL raises OSError, SyntaxError, struct.error ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded ({reason}); copy it again or remove it") from error


def to_grey(image: PILImage.Image) -> PILImage.Image:
    """Convert any PIL image to mode L, 0 to 255, transparent parts on black.

    Modes of more than 8 bits (I;16, I, F) are scaled linearly by the image's own range, darkest to 0 and
    brightest to 255: some scanners use only 10 of the 16 bits, which a fixed scale would make black.
    """
    if image.mode == "L" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = values.min(), values.max()
        scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
        return PILImage.fromarray(np.rint(scaled).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "black"), image).convert("L")
    return image.convert("RGB").convert("L")  # CMYK and YCbCr have no direct conversion to L


def prepare_image(image: PILImage.Image, image_size: int) -> np.ndarray:
    """Convert an image to uint8 (image_size, image_size), 0 to 255: grey, padded to a square, then resized.

    The padding is black, by whole pixels: 256 wide x 240 high gets 8 rows above and below and, for
    image_size=256, is not resampled. Otherwise the square is resized bicubically with antialiasing.
    """
    grey = to_grey(image)
    side = max(grey.size)
    if grey.size != (side, side):
        square = PILImage.new("L", (side, side), 0)
        square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
        grey = square
    if side != image_size:
        grey = grey.resize((image_size, image_size), PILImage.Resampling.BICUBIC)
    return np.asarray(grey)


def to_arrays(dataset: Dataset, image_size: int, num_proc: int | None = None) -> Dataset:
    """Prepare the column `image` as uint8 (image_size, image_size); other columns are kept.

    The result is cached by Hugging Face as a memory-mapped Arrow file that all processes share; changed files
    are read again. Read it through `SliceTensors`, or `.with_format("numpy")`.

    Raises:
        DataError: a file cannot be decoded; the message names the first.
    """
    features = Features({**dataset.features, "image": Array2D((image_size, image_size), "uint8")})
    return dataset.cast_column("image", Image(decode=False)).map(
        _prepare_batch,
        batched=True,
        batch_size=100,
        fn_kwargs={"image_size": image_size, "version": PREPARATION_VERSION},
        features=features,
        num_proc=num_proc,
        desc=f"Preparing images at {image_size} px",
    )


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images, 0 to 255, of any shape to float32 in [-1, 1]: x / 127.5 - 1."""
    return images.float().div_(127.5).sub_(1)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return at most `count` indices below `total`, evenly spaced, the first and the last among them."""
    return torch.linspace(0, total - 1, min(count, total)).round().int().tolist()


class SliceTensors(torch.utils.data.Dataset):
    """The dataset of `to_arrays` as tensors: image float32 (1, S, S) in [-1, 1], label int64 ().

    A DataLoader collates image (B, 1, S, S) and label (B,), reading each batch at once.
    """

    def __init__(self, arrays: Dataset):
        # By default, the numpy format gives int64.
        self.arrays = arrays.select_columns(["image"]).with_format("numpy", dtype=np.uint8)
        self.labels = torch.tensor(arrays["label"][:])  # int64 (N,)
        self.subjects = np.array(arrays["subject"][:])  # str (N,)
        self.class_names = tuple(arrays.features["label"].names)
        names = [name for name in arrays.column_names if name.startswith(CONDITION)]
        self.condition_rows: torch.Tensor | None = None  # (N, K), of `condition_rows`, once it is known
        self.conditions = {name.removeprefix(CONDITION): arrays[name][:] for name in names}  # text, each N

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        pixels = torch.from_numpy(self.arrays[list(indices)]["image"])  # uint8 (B, S, S)
        images = to_float(pixels.unsqueeze(1))  # (B, 1, S, S), [-1, 1]
        return [{"image": x, "label": y} for x, y in zip(images, self.labels[list(indices)], strict=True)]


def _add_columns(dataset: Dataset, by_path: dict[str, SliceFile], class_names: Sequence[str]) -> Dataset:
    files = [by_path[row["path"]] for row in dataset.cast_column("image", Image(decode=False))["image"]]
    label = ClassLabel(names=list(class_names))
    dataset = dataset.add_column("label", [file.label for file in files], feature=label)
    dataset = dataset.add_column("subject", [file.subject for file in files])
    dataset = dataset.add_column("scan", [file.scan for file in files])
    for name in files[0].conditions if files else ():
        dataset = dataset.add_column(CONDITION + name, [file.conditions[name] for file in files])
    return dataset.add_column("slice", [file.slice for file in files])


def _split_off_val(train: Dataset, val_fraction: float, root: Path) -> tuple[Dataset, Dataset]:
    """Split train into training and validation slices, by subject."""
    labels, subjects = train["label"][:], train["subject"][:]
    by_class: dict[int, set[str]] = {}
    for label, subject in zip(labels, subjects, strict=True):
        by_class.setdefault(label, set()).add(subject)
    chosen = choose_val_subjects(by_class, val_fraction)
    if not chosen:
        raise DataError(
            f"{root / 'train'}: too few subjects for a validation set; add some, or a val/ folder"
        )
    kept = [i for i, subject in enumerate(subjects) if subject not in chosen]
    return train.select(kept), train.select([i for i, subject in enumerate(subjects) if subject in chosen])


def _prepare_batch(batch: dict[str, list], image_size: int, version: int) -> dict[str, list[np.ndarray]]:
    return {"image": [prepare_image(read_image(image["path"]), image_size) for image in batch["image"]]}
