"""The leak scan: what must not be in a folder that is pushed.

Images are first encoded anew from their pixels, so that they carry nothing else. Every text file and the
header of every safetensors file are searched for IDs of subjects and scans, absolute paths, the names of the
user and of the machine, and secrets. Every image is compared with all images of the training data, by content
and by perceptual hash. A file of another type is itself a finding, since it cannot be scanned.
"""

from __future__ import annotations

import csv
import getpass
import html
import json
import os
import re
import socket
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import get_token
from PIL import Image
from tqdm.auto import tqdm

from adni_ldm.data.cells import unescape
from adni_ldm.data.duplicates import content_hash, difference_hash
from adni_ldm.data.folder import IMAGE_FORMATS, FolderListing
from adni_ldm.data.slices import prepare_image, read_image
from adni_ldm.errors import UserError

# Largest Hamming distance, of 576 bits, at which an image counts as a near-duplicate of a training image. A
# memorized slice is generated as the autoencoder reconstructs it: in the demo's cohort at 64 px, 100 training
# slices differ from their own reconstructions in 8 to 27 bits, and from any slice of another subject in at
# least 34; the nearest of 1000 samples differs in 36. duplicates.py has figures for copies, and at 256 px.
MAX_DISTANCE = 28

TEXTS = (".json", ".md", ".csv", ".py", ".txt", ".html", ".yaml", ".jinja")
IMAGES = (".png", ".jpg", ".jpeg")
MOST_FINDINGS = 20  # named in the error message

_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}"
    r"|BEGIN [A-Z ]*PRIVATE KEY"
)
# ADNI's own IDs of subjects and images, whatever the data. No example: this file is scanned too.
_ADNI_ID = re.compile(r"(?<![A-Za-z0-9])(?:\d{3}_S_\d{4,5}|I\d{5,8})(?![A-Za-z0-9])")
# Absolute path, but not AD/NC, a URL or a closing tag; a file URL, a home folder, a Windows drive or share.
_PATH = re.compile(
    r"(?<![\w./}\])<*~-])/[\w.@+-]+/[\w.@+/-]*\w|\b[A-Za-z]:\\\\?\w[\w\\. -]*|(?<![\w/])~\w*/\w+|file:/+\w+"
    r"|(?<![\w\\)(\]\[])\\{2,4}\w[\w.-]+\\{1,2}\w[\w.-]+\\{1,2}\w+"
)
# Common names of accounts and machines, which identify nobody.
_COMMON_NAMES = frozenset(
    "root user users admin ubuntu debian runner home docker jovyan nobody localhost vm model data train test "
    "python main adni diffusion latent".split()
)


_ID_COLUMN = r"(?i:(?:subject|scan|patient|participant|image|ptid|rid)(?:[ _]?(?:id|name))?)"


@dataclass(frozen=True)
class TrainingIndex:
    """What identifies the training data: IDs, paths, and hashes of the images at `size` px."""

    ids: frozenset[str]  # of subjects and scans; not those that are also the name of a class
    folders: frozenset[str]
    size: int
    files: tuple[str, ...]  # of the images, relative to their data folder
    contents: tuple[bytes, ...]
    hashes: np.ndarray  # uint64 (N, 9)


def index_training_data(listings: Sequence[FolderListing], size: int) -> TrainingIndex:
    """Index every image of the data folders, each prepared at `size` px as training prepares it."""
    files = list({file.path: file for listing in listings for file in listing.files}.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda file: _hash_image(file.path, size), files)
        hashed = list(tqdm(results, total=len(files), desc="hashing training images", unit="slice"))
    return TrainingIndex(
        ids=frozenset(
            unicodedata.normalize("NFKC", name)
            for file in files
            for name in (file.subject, file.scan)
            if name
        )
        - {name for listing in listings for name in listing.class_names},
        folders=frozenset(str(listing.root) for listing in listings),
        size=size,
        files=tuple(Path(*Path(file.path).parts[-3:]).as_posix() for file in files),
        contents=tuple(content for content, _ in hashed),
        hashes=np.array([bits for _, bits in hashed], np.uint64).reshape(-1, 9),
    )


def check_leaks(
    folder: Path, training: TrainingIndex, *repo_ids: str, allow_real_images: bool = False
) -> None:
    """Encode the images below `folder` anew, and raise UserError if `find_leaks` finds anything."""
    encode_anew(folder)
    findings = find_leaks(folder, training, *repo_ids, allow_real_images=allow_real_images)
    if findings:
        listed = "; ".join(findings[:MOST_FINDINGS])
        more = f"; and {len(findings) - MOST_FINDINGS} more" if len(findings) > MOST_FINDINGS else ""
        raise UserError(f"nothing was pushed, the leak scan found: {listed}{more}")


def encode_anew(folder: Path) -> None:
    """Write every image below `folder` again from its pixels, grey or RGB: without EXIF, private chunks,
    further frames, and bytes that follow the image.

    Raises:
        UserError: a file with the name of an image is none.
    """
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGES and not path.is_symlink():
            try:
                with Image.open(path, formats=IMAGE_FORMATS) as image:
                    pixels = np.asarray(image.convert("L" if image.mode == "L" else "RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"{path.relative_to(folder)}: not an image ({error}); remove it") from error
            Image.fromarray(pixels).save(path, quality=95)


def find_leaks(
    folder: Path, training: TrainingIndex, *repo_ids: str, allow_real_images: bool = False
) -> list[str]:
    """Scan all files below `folder`; returns one line for each finding.

    Args:
        repo_ids: the account in them is not a finding, though it may be the user's name.
        allow_real_images: do not compare images with the training images.
    """
    findings = []
    by_content = dict(zip(training.contents, training.files))
    forbidden = _forbidden_strings(training)
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in tqdm(paths, desc="leak scan", unit="file"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.suffix.lower() not in (*TEXTS, *IMAGES, ".safetensors"):
            findings.append(f"{name}: this type of file cannot be scanned")
            continue
        try:
            text = _without_accounts(f"{name}\n{_extract_text(path)}", repo_ids)
        except (ValueError, yaml.YAMLError, csv.Error) as error:
            findings.append(f"{name}: cannot be read as {path.suffix} ({' '.join(str(error).split())[:100]})")
            continue
        findings += [f"{name}: {leak}" for leak in _find_in_text(text, training.ids, forbidden)]
        if path.suffix.lower() in IMAGES and not allow_real_images:
            findings += [f"{name}: {match}" for match in _match_training_image(path, training, by_content)]
    return findings


def _without_accounts(text: str, repo_ids: Sequence[str]) -> str:
    """`text` with NAME for ME/NAME, but where this is part of a path."""
    for repo_id in repo_ids:
        pattern = rf"(huggingface\.co/|(?<![\w./\\~@:+-])){re.escape(repo_id)}(?![\w/\\@+-]|\.\w)"
        text = re.sub(pattern, lambda match: match[1] + repo_id.partition("/")[2], text)  # noqa: B023
    return text


def _hash_image(path: str | Path, size: int) -> tuple[bytes, np.ndarray]:
    grey = Image.fromarray(prepare_image(read_image(path), size))
    return content_hash(grey), difference_hash(grey)


def _match_training_image(path: Path, training: TrainingIndex, by_content: dict[bytes, str]) -> Iterator[str]:
    if not training.files:
        yield "there are no training images to compare it with"
        return
    content, bits = _hash_image(path, training.size)
    if content in by_content:
        yield f"identical to the training image {by_content[content]}"
        return
    distance = np.bitwise_count(training.hashes ^ bits).sum(axis=1)
    if distance.min() <= MAX_DISTANCE:
        nearest = training.files[int(distance.argmin())]
        yield f"near-duplicate of the training image {nearest} ({distance.min()} of 576 bits differ)"


def _extract_text(path: Path) -> str:
    """The text of a text file, the header of a safetensors file; "" of an image.

    Raises:
        ValueError, yaml.YAMLError, csv.Error: the file is not what its name says.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGES:
        return ""
    if suffix == ".safetensors":
        with path.open("rb") as file:
            text = file.read(int.from_bytes(file.read(8), "little")).decode()
    else:
        text = path.read_bytes().decode()
    if "\0" in text:
        raise ValueError("not UTF-8 text")
    if suffix == ".html":  # base64 of embedded images has slashes of its own
        text = re.sub(r"data:image/[\w.+-]+;base64,[\w+/=]+", "", text)
    if suffix in (".html", ".md"):  # again with entities such as &#48; decoded
        text += "\n" + html.unescape(text)
    if suffix in (".json", ".safetensors"):  # again with escapes such as \u00e9 and \/ decoded
        text += "\n" + json.dumps(json.loads(text), ensure_ascii=False)
    if suffix == ".yaml":
        text += "\n" + json.dumps(list(yaml.safe_load_all(text)), ensure_ascii=False, default=str)
    if suffix == ".csv":  # the cells of columns such as subject again, in quotes: a number is an ID there
        rows = list(csv.reader(text.splitlines(), strict=True)) or [[]]
        columns = [index for index, name in enumerate(rows[0]) if re.fullmatch(_ID_COLUMN, name.strip())]
        text += "\n" + "\n".join(
            f'"{unescape(row[index].strip())}"' for row in rows for index in columns if index < len(row)
        )
    return unicodedata.normalize("NFKC", text)


def _forbidden_strings(training: TrainingIndex) -> dict[str, str]:
    """Paths, names and secrets of this machine: {string: description of the finding}."""
    folders = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *map(Path, training.folders)}
    found = {str(path): f"path of this machine {str(path)!r}" for path in folders if len(path.parts) > 2}
    names = {getpass.getuser(): "user", Path.home().name: "user", socket.gethostname(): "machine"}
    for name, owner in names.items():
        if len(name) > 2 and name.lower() not in _COMMON_NAMES:
            found[name] = f"name of the {owner} {name!r}"
    secrets = {value for name, value in os.environ.items() if re.search("TOKEN|SECRET|PASSW|API_?KEY", name)}
    secrets.add(get_token() or "")
    return found | {secret: f"a secret, {secret[:4]}…" for secret in secrets if len(secret) > 7}


def _find_in_text(text: str, ids: frozenset[str], forbidden: dict[str, str]) -> Iterator[str]:
    lower = text.lower()
    found = {name for name in ids if name.lower() in lower and _is_an_id(name, text)}
    found |= set(_ADNI_ID.findall(text))
    yield from (f"subject or scan {name!r}" for name in sorted(found)[:5])
    if len(found) > 5:
        yield f"{len(found) - 5} more subjects or scans"
    for string, description in forbidden.items():
        if string in text and re.search(rf"(?<![A-Za-z0-9]){re.escape(string)}(?![A-Za-z0-9])", text):
            yield description
    yield from (f"path {path!r}" for path in sorted(set(_PATH.findall(text)))[:5])
    yield from (f"a secret, {secret[:4]}…" for secret in sorted(set(_SECRET.findall(text))))


def _is_an_id(name: str, text: str) -> bool:
    """Whether `name` occurs as an ID and not by chance: 1000 may be a step; I1000 and 1000_78 are scans."""
    word = re.escape(name)
    if name.isdecimal() and len(name) >= 5:
        pattern = rf"(?<![\d.])(?<!\d[eE][+-]){word}(?!\.?\d)"
    elif not name.isalpha() and not name.isdecimal() and len(name) >= 4:
        pattern = rf"(?i)(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])"
    else:  # short: in quotes, with the number of a slice, or as a field of its own
        field = (
            r"(?:^|[,;|\t:=(\[{>`])[ \t]*" if not name.isdecimal() else rf"{_ID_COLUMN}[\"']?\s*[:=]\s*\[?"
        )
        pattern = rf"(?<![A-Za-z0-9])(?:I{word}(?!\w)|{word}_\d+(?!\w)|\"{word}\"|'{word}')"
        pattern += rf"|(?m:{field}{word}[ \t]*(?:$|[,;|\t)\]}}<`]))"
    return re.search(pattern, text) is not None
