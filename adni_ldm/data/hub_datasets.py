"""Data sets of the datasets library, as a folder of slices in the cache: Hub names, save_to_disk, Parquet.

    folder = as_folder("ME/SLICES", ("AD", "NC"), subject_column="patient")     # any other data_dir: itself

The images are written as they are encoded, with a metadata.csv and a manifest.json, so that whatever reads a
folder (training, quality control, the leak scan) reads a data set too. No code of a repository is run.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset, load_from_disk
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image as PILImage

from adni_ldm.data.archives import cache_dir
from adni_ldm.data.cells import escape
from adni_ldm.data.folder import IMAGE_SUFFIXES
from adni_ldm.data.manifest import MANIFEST, write_manifest
from adni_ldm.data.slices import IMAGE_FORMATS
from adni_ldm.data.splits import DataError
from adni_ldm.errors import UserError

# The settings of a command that `as_folder` takes.
OPTIONS = ("dataset_config_name", "image_column", "label_column", "subject_column")
OPTIONS += ("train_split", "val_split", "test_split", "no_subjects")
_OWN = ("file_name", "label", "subject")  # columns of metadata.csv that are written here
_ALIASES = {"NC": "CN"}  # other name of a class
_LONGEST = 1000  # characters of a value of another column; what is longer is no covariate
_PLAIN = re.compile(r"(large_)?string|u?int\d+|float\d+|bool")  # types of such columns
_FORMAT = 2  # increase it with every change in what is written
_HUB_NAME = re.compile(r"(?!data/|runs/)[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_name(data_dir: str | Path) -> bool:
    """Whether this is no path here, and has the form of a data set's name on the Hub, USER/NAME."""
    path = Path(data_dir)
    return bool(_HUB_NAME.fullmatch(str(data_dir))) and not path.exists() and not path.parent.is_dir()


def as_folder(
    data_dir: str | Path,
    class_names: Sequence[str],
    *,
    dataset_config_name: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    subject_column: str = "subject",
    train_split: str = "train",
    val_split: str | None = None,
    test_split: str | None = None,
    no_subjects: bool = False,
) -> Path:
    """Return the folder in the cache that a data set is written to; of any other `data_dir`, itself.

    Args:
        class_names: which classes the numbers of a label column without names stand for.
        val_split, test_split: None: val or validation, and test, if there are any.
        no_subjects: the data set does not say who is on which slice; each slice counts as a subject then, and
            the folder as one of unknown subjects.

    Raises:
        DataError: a column or a split is missing, with those that there are; a label or an image is unusable.
    """
    splits = _load(data_dir, dataset_config_name)
    if splits is None:
        return Path(data_dir)
    named = _choose_splits(data_dir, splits, train_split, val_split, test_split)
    columns = [image_column, label_column, *([] if no_subjects else [subject_column])]
    for name, rows in named.items():
        if missing := [column for column in columns if column not in rows.column_names]:
            flags = {image_column: "--image_column", label_column: "--label_column"}
            flag = flags.get(missing[0], "--subject_column")
            advice = ", or --no_subjects if there are none" if flag == "--subject_column" else ""
            listed = ", ".join(rows.column_names)
            raise DataError(
                f"{data_dir}: no column {missing[0]} in its split {name}; there are {listed}: name it with "
                f"{flag}{advice}"
            )
    labels = {split: _labels(data_dir, rows, label_column, class_names) for split, rows in named.items()}
    _check_classes(data_dir, Counter(label for part in labels.values() for label in part), class_names)

    prints = {split: rows._fingerprint for split, rows in named.items()}
    key = json.dumps([_FORMAT, prints, columns, list(class_names), no_subjects], sort_keys=True)
    folder = cache_dir("unpacked") / hashlib.sha256(key.encode()).hexdigest()
    if (folder / MANIFEST).is_file():
        return folder
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))  # mode 0700
    try:
        for split, rows in named.items():
            subject = None if no_subjects else subject_column
            _write_split(data_dir, partial / split, rows, image_column, labels[split], subject)
        write_manifest(partial, {"source": "data set"})
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError:
        if not (folder / MANIFEST).is_file():  # another process has just written the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _load(data_dir: str | Path, config_name: str | None) -> DatasetDict | None:
    """The data set's splits; None of what is a folder of images or a zip."""
    path = Path(data_dir).expanduser()
    options = {"cache_dir": str(cache_dir("datasets"))}
    try:
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            loaded = load_from_disk(str(path))
        elif path.suffix == ".parquet" and path.is_file():
            loaded = load_dataset("parquet", data_files=str(path), **options)
        elif any(any(path.glob(pattern)) for pattern in ("*.parquet", "data/*.parquet")):
            loaded = load_dataset(str(path), config_name, **options)
        elif is_hub_name(data_dir):
            loaded = load_dataset(str(data_dir), config_name, **options)
        else:
            return None
    except Exception as error:  # of the Hub's client, of a builder, of pyarrow ...
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{data_dir}: no folder, and no data set that can be loaded ({reason})") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _choose_splits(
    data_dir: str | Path, splits: DatasetDict, train: str, val: str | None, test: str | None
) -> dict[str, Dataset]:
    chosen = {"train": train, "val": val, "test": test}
    for split, names in (("val", ("val", "validation")), ("test", ("test",))):
        if chosen[split] is None:
            chosen[split] = next((name for name in names if name in splits and name != train), None)
    for split, name in chosen.items():
        if name is not None and name not in splits:
            listed = ", ".join(splits)
            raise DataError(f"{data_dir}: no split {name}; there are {listed}: name it with --{split}_split")
    return {split: splits[name] for split, name in chosen.items() if name is not None}


def _labels(data_dir: str | Path, rows: Dataset, column: str, class_names: Sequence[str]) -> list[str]:
    """The class of each row by name, of text, of a ClassLabel, or of numbers of the classes."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        names: Sequence[str] = feature.names
    else:
        names = class_names
    found = []
    for row, value in enumerate(rows[column][:]):
        text = str(value).strip()
        if text not in names and text.isdecimal() and int(text) < len(names):
            text = names[int(text)]
        number = re.fullmatch(r"-?[\d.]+", text) and text not in names
        if number or value is None or not text or text[0] == "." or set(text) & set('/\\\0<>:"|?*'):
            raise DataError(
                f"{data_dir}: {column} {str(value)[:50]!r} of row {row} is none of the {len(names)} classes "
                f"{', '.join(names)}, and no name of one; give --classes, or another --label_column"
            )
        found.append(text)
    return found


def _check_classes(data_dir: str | Path, counts: Mapping[str, int], class_names: Sequence[str]) -> None:
    filled = {name for name in class_names if counts.get(name) or counts.get(_ALIASES.get(name))}
    if missing := [name for name in class_names if name not in filled]:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())[:20])
        raise DataError(f"{data_dir}: no slices of class {missing[0]}; there are {listed}: give --classes")


def _write_split(
    data_dir: str | Path,
    folder: Path,
    rows: Dataset,
    image_column: str,
    labels: Iterable[str],
    subject_column: str | None,
) -> None:
    """Write a split's images as {CLASS}/NAME_SLICE.png, .jpg …, and its metadata.csv."""
    try:
        images = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are ValueErrors
        raise DataError(
            f"{data_dir}: column {image_column} holds no images; name the column with --image_column"
        ) from error
    named = (*_OWN, image_column, subject_column)
    kinds = {name: kind for name, kind in rows.features.items() if name not in named}
    kept = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel) or _is_plain(kind)]
    others = [*kept, *([subject_column] if subject_column else [])]
    # Rows may name files. Those of the Hub have no business with others than the library has downloaded.
    roots = [Path(HF_HUB_CACHE), cache_dir("datasets")] if is_hub_name(data_dir) else [Path("/")]
    details_of = rows.select_columns(others) if others else [{}] * len(rows)
    folder.mkdir()
    seen: Counter[str] = Counter()  # slices of each subject so far
    table = []
    for number, (image, row, label) in enumerate(zip(images, details_of, labels, strict=True)):
        where = f"{data_dir}: row {number}"
        content, suffix = _content(where, image[image_column], roots)
        details = {name: _text(kinds[name], row[name], whole=name == "slice") for name in kept}
        details = {name: text for name, text in details.items() if text}
        if subject_column is None:
            # Named by its content, so that no two data sets have slices of one name that are not the same.
            subject = f"image-{hashlib.sha256(content).hexdigest()[:16]}"
            name = subject
        else:
            subject = _text(rows.features[subject_column], row[subject_column], whole=True)
            name = f"row{number:07d}"
            if not subject:
                raise DataError(f"{where} has no {subject_column}; complete it, or add --no_subjects")
            details = {"subject": subject, "image_id": subject} | details
        position = details.pop("slice", "")
        position = position if position.isdecimal() else str(seen[subject])
        seen[subject] += 1
        place = f"{label}/{name}_{seen[subject] - 1}{suffix}"
        (folder / label).mkdir(exist_ok=True)
        (folder / place).write_bytes(content)
        table.append({"file_name": place, "label": label, "slice": position, **details})
    long = {name for row in table for name in row if name in kept and len(row[name]) > _LONGEST}
    names = dict.fromkeys(name for row in table for name in row if name not in long)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: escape(row[name]) for name in row} for row in table)


def _is_plain(kind: object) -> bool:
    return isinstance(kind, Value) and bool(_PLAIN.fullmatch(kind.dtype))


def _text(kind: object, value: object, whole: bool = False) -> str:
    """A value as metadata.csv has it: "" where missing, a ClassLabel's name, and if `whole` 3.0 as 3."""
    if value is None or value != value or (isinstance(kind, ClassLabel) and value < 0):
        return ""
    if isinstance(kind, ClassLabel):
        return kind.int2str(value)
    return str(int(value) if whole and isinstance(value, float) and value.is_integer() else value).strip()


def _content(where: str, image: Mapping | None, roots: Iterable[Path]) -> tuple[bytes, str]:
    """An encoded image, and the suffix of its format. A file that a row names is read below `roots` alone."""
    if image and image["bytes"] is None and image["path"] is not None:
        path = Path(image["path"]).resolve()
        if not any(path.is_relative_to(root.resolve()) for root in roots):
            raise DataError(
                f"{where} names a file of this machine, {path}: load another data set, that holds its images"
            )
    try:
        content = image["bytes"] or Path(image["path"]).read_bytes()
        with PILImage.open(io.BytesIO(content), formats=IMAGE_FORMATS) as opened:
            suffix = f".{opened.format.lower()}"
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{where} has no image that can be read ({error}); remove it") from error
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"{where} is a {opened.format}; {', '.join(IMAGE_SUFFIXES)} are read")
    return content, suffix
