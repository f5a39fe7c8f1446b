"""Sets of slices that are compared: real slices by split, and samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from adni_ldm.data.cells import unescape_table
from adni_ldm.data.sample_folder import SAMPLE_COLUMNS
from adni_ldm.data.slices import SliceTensors, prepare_image, read_image, to_arrays, to_float
from adni_ldm.errors import UserError
from adni_ldm.evaluation.estimates import FEWEST_SLICES, FEWEST_SUBJECTS
from adni_ldm.generation import generate_images, image_seed
from adni_ldm.pipeline import ClassConditionalLDMPipeline


@dataclass(frozen=True)
class ImageSet:
    """Slices with their classes, subjects and conditions, in 8 bits.

    A sample counts as a subject; image k of every class is "sample k", since they share their noise. Its
    conditions are what was asked for.
    """

    images: torch.Tensor  # uint8 (N, 1, H, W), 0 to 255
    labels: np.ndarray  # int64 (N,)
    subjects: np.ndarray  # str (N,)
    class_names: tuple[str, ...]
    conditions: Mapping[str, np.ndarray] = field(default_factory=dict)  # str (N,) each; "" where missing

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The rows at `indices`, or where a boolean mask is true."""
        rows = np.arange(len(self))[indices]
        return ImageSet(
            self.images[torch.from_numpy(rows)],
            self.labels[rows],
            self.subjects[rows],
            self.class_names,
            {name: values[rows] for name, values in self.conditions.items()},
        )

    def of_class(self, name: str) -> ImageSet:
        """The rows of one class."""
        return self.take(self.labels == self.class_names.index(name))

    def floats(self, indices: Sequence[int] | slice = slice(None)) -> torch.Tensor:
        """Float32 (n, 1, H, W) in [-1, 1], the range of every network here."""
        return to_float(self.images[indices])


def join(first: ImageSet, second: ImageSet) -> ImageSet:
    """The rows of both sets; a condition that one of them does not have is missing there."""
    conditions = {
        name: np.concatenate([one.conditions.get(name, np.full(len(one), "")) for one in (first, second)])
        for name in {**first.conditions, **second.conditions}
    }
    return ImageSet(
        torch.cat([first.images, second.images]),
        np.concatenate([first.labels, second.labels]),
        np.concatenate([first.subjects, second.subjects]),
        first.class_names,
        conditions,
    )


def relabel(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """The same slices with the labels of `class_names`; -1 for a class that is not among them."""
    labels = {name: label for label, name in enumerate(class_names)}
    new = np.array([labels.get(name, -1) for name in images.class_names])
    return replace(images, labels=new[images.labels], class_names=tuple(class_names))


def real_set(slices: Dataset, image_size: int, most: int | None = None, seed: int = 0) -> ImageSet:
    """A split of `load_slices` at `image_size` pixels; `most` as in `image_set`."""
    return image_set(SliceTensors(to_arrays(slices, image_size)), most, seed)


def image_set(slices: SliceTensors, most: int | None = None, seed: int = 0) -> ImageSet:
    """A recipe's training or held-out slices, in memory.

    Args:
        most: keep about this many slices, the same share of every subject's and at least one.
    """
    chosen = np.arange(len(slices))
    if most is not None and len(chosen) > most:
        chosen = thin(slices.subjects, most, seed)
    pixels = torch.from_numpy(slices.arrays[chosen]["image"])[:, None]
    conditions = {name: np.array(values, dtype=str)[chosen] for name, values in slices.conditions.items()}
    labels, subjects = slices.labels[chosen].numpy(), slices.subjects[chosen]
    return ImageSet(pixels, labels, subjects, slices.class_names, conditions)


def too_few(samples: ImageSet, held_out: ImageSet) -> str:
    """What there is too little of for an interval, by class; "" where there is enough."""
    for label, name in enumerate(samples.class_names):
        if (count := int((samples.labels == label).sum())) < FEWEST_SLICES:
            return f"{count} samples of {name}: at least {FEWEST_SLICES} are needed"
        if (count := len(np.unique(held_out.subjects[held_out.labels == label]))) < FEWEST_SUBJECTS:
            return f"{count} held-out subjects of {name}: at least {FEWEST_SUBJECTS} are needed"
    return ""


def read_sample_table(folder: str | Path) -> pd.DataFrame:
    """metadata.csv of samples as text, indexed by file_name; empty without one. Raises UserError without the
    folder, and where the file cannot be read."""
    path = _check_folder(folder) / "metadata.csv"
    if not path.is_file():
        return pd.DataFrame()
    try:
        return unescape_table(pd.read_csv(path, dtype=str, keep_default_na=False)).set_index("file_name")
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{path}: cannot be read as a table ({error}); sample.py writes it") from error


def conditions_asked(samples: pd.DataFrame, real_columns: Collection[str]) -> list[str]:
    """The columns of `read_sample_table` that real data have too: what was asked for beside the class."""
    return [name for name in samples if name in real_columns and name not in SAMPLE_COLUMNS]


def load_samples(
    folder: str | Path,
    class_names: Sequence[str],
    most: int | None = None,
    conditions: pd.DataFrame | None = None,
) -> ImageSet:
    """The samples in `folder`, one subfolder per class, as sample.py writes them.

    Args:
        most: read at most this many of each class.
        conditions: columns of `read_sample_table` that were asked for; "" where they were not.

    Raises:
        UserError: no such folder, no sample of any class, or samples of different sizes.
    """
    folder = _check_folder(folder)
    images, labels, files = [], [], []
    image_size = _first_size(folder, class_names)
    for label, name in enumerate(class_names):
        for path in sorted((folder / name).glob("*.png"))[:most]:
            image = read_image(path)
            if image.size != (image_size, image_size):
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels, not {image_size} x {image_size}; all "
                    "samples must have one size, to which real slices are resized"
                )
            images.append(torch.from_numpy(prepare_image(image, image_size).copy()))
            labels.append(label)
            files.append(f"{name}/{path.name}")
    found = _sample_set(torch.stack(images)[:, None], np.array(labels), class_names)
    if conditions is None:
        return found
    asked = conditions[~conditions.index.duplicated()].reindex(files, fill_value="")
    return replace(found, conditions={name: asked[name].to_numpy(str) for name in asked})


def generate_image_set(
    pipeline: ClassConditionalLDMPipeline, count: int, seed: int, batch_size: int = 50, **options
) -> ImageSet:
    """Generate `count` slices of each class; image k of each class starts from the same noise.

    Args:
        options: further arguments of the pipeline's call.
    """
    names = tuple(pipeline.class_embedding.config.class_names)
    labels = np.repeat(np.arange(len(names)), count)
    seeds = [image_seed(seed, index) for index in range(count)] * len(names)
    images = torch.cat(list(generate_images(pipeline, labels.tolist(), seeds, batch_size, **options)))
    return _sample_set(images.mul(255).round().to(torch.uint8), labels, names)


def _sample_set(images: torch.Tensor, labels: np.ndarray, class_names: Sequence[str]) -> ImageSet:
    # Image k of every class is generated from the same noise, so the two are not independent.
    within = np.zeros(len(labels), dtype=int)
    for label in np.unique(labels):
        within[labels == label] = np.arange((labels == label).sum())
    subjects = np.array([f"sample {index}" for index in within])
    return ImageSet(images, labels, subjects, tuple(class_names))


def _check_folder(folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        raise UserError(f"--samples {folder}: no such folder; python sample.py --class all writes one")
    return Path(folder)


def _first_size(folder: Path, class_names: Sequence[str]) -> int:
    for name in class_names:
        for path in sorted((folder / name).glob("*.png")):
            return read_image(path).height
    patterns = ", ".join(f"{name}/*.png" for name in class_names)
    raise UserError(f"--samples {folder}: no samples found (searched for {patterns})")


def thin(subjects: np.ndarray, most: int, seed: int) -> np.ndarray:
    """About `most` row indices, sorted: the same share of each subject's rows, and at least one."""
    share = min(1.0, most / max(1, len(subjects)))
    order = np.random.default_rng(seed).permutation(len(subjects))
    kept = []
    for subject in np.unique(subjects):
        rows = order[subjects[order] == subject]
        kept.append(rows[: max(1, round(share * len(rows)))])
    return np.sort(np.concatenate([np.zeros(0, dtype=int), *kept]))
