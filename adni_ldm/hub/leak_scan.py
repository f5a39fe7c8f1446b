"""The leak scan: what must not be in a folder that is pushed.

Every text file, the header of every safetensors file and the metadata of every image are searched for IDs of
subjects and scans, absolute paths, the names of the user and of the machine, and secrets. Every image is
compared with all images of the training data, by content and by perceptual hash. A file of another type is
itself a finding, since it cannot be scanned.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub import get_token
from PIL import Image
from tqdm.auto import tqdm

from adni_ldm.data.duplicates import content_hash, difference_hash
from adni_ldm.data.folder import FolderListing
from adni_ldm.data.slices import prepare_image, read_image

# Largest Hamming distance, of 576 bits, at which an image counts as a near-duplicate of a training image. A
# memorized slice is generated as the autoencoder reconstructs it: in the demo's cohort at 64 px, 100 training
# slices differ from their own reconstructions in 8 to 27 bits, and from any slice of another subject in at
# least 34; the nearest of 1000 samples differs in 36. duplicates.py has figures for copies, and at 256 px.
MAX_DISTANCE = 28

TEXTS = (".json", ".md", ".csv", ".py", ".txt", ".html")
IMAGES = (".png", ".jpg", ".jpeg")

_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}"
    r"|BEGIN [A-Z ]*PRIVATE KEY"
)
# ADNI's own IDs, whatever the data: 002_S_0413, I218391.
_ADNI_ID = re.compile(r"(?<![A-Za-z0-9])(?:\d{3}_S_\d{4,5}|I\d{5,8})(?![A-Za-z0-9])")
# /a/b and not AD/NC, https://a/b or </b>; file:///a; C:\a; ~/a
_PATH = re.compile(
    r"(?<![\w.:/}\])<*~-])/[\w.@+-]+/[\w.@+/-]*\w|\b[A-Za-z]:\\\\?\w[\w\\. -]*|(?<![\w/])~\w*/\w+|file:/+\w+"
)
# Common names of accounts and machines, which identify nobody.
_COMMON_NAMES = frozenset(
    "root user users admin ubuntu debian runner home docker jovyan nobody localhost vm model data train test "
    "python main adni diffusion latent".split()
)


@dataclass(frozen=True)
class TrainingIndex:
    """What identifies the training data: IDs, paths, and hashes of the images at `size` px."""

    ids: frozenset[str]  # of subjects and scans
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
        ids=frozenset(name for file in files for name in (file.subject, file.scan) if name),
        folders=frozenset(str(listing.root) for listing in listings),
        size=size,
        files=tuple(Path(*Path(file.path).parts[-3:]).as_posix() for file in files),
        contents=tuple(content for content, _ in hashed),
        hashes=np.array([bits for _, bits in hashed], np.uint64).reshape(-1, 9),
    )


def find_leaks(
    folder: Path, training: TrainingIndex, repo_id: str, allow_real_images: bool = False
) -> list[str]:
    """Scan all files below `folder`; returns one line for each finding.

    Args:
        repo_id: not a finding, though the account in it may be the user's name.
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
        text = f"{name}\n{_extract_text(path)}".replace(repo_id, "")
        findings += [f"{name}: {leak}" for leak in _find_in_text(text, training.ids, forbidden)]
        if path.suffix.lower() in IMAGES and not allow_real_images and training.files:
            findings += [f"{name}: {match}" for match in _match_training_image(path, training, by_content)]
    return findings


def _hash_image(path: str | Path, size: int) -> tuple[bytes, np.ndarray]:
    grey = Image.fromarray(prepare_image(read_image(path), size))
    return content_hash(grey), difference_hash(grey)


def _match_training_image(path: Path, training: TrainingIndex, by_content: dict[bytes, str]) -> Iterator[str]:
    content, bits = _hash_image(path, training.size)
    if content in by_content:
        yield f"identical to the training image {by_content[content]}"
        return
    distance = np.bitwise_count(training.hashes ^ bits).sum(axis=1)
    if distance.min() <= MAX_DISTANCE:
        nearest = training.files[int(distance.argmin())]
        yield f"near-duplicate of the training image {nearest} ({distance.min()} of 576 bits differ)"


def _extract_text(path: Path) -> str:
    """The text of a text file, the header of a safetensors file, the metadata of an image."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little")).decode(errors="replace")
    if path.suffix.lower() in IMAGES:
        with Image.open(path) as image:
            image.load()  # text chunks may follow the pixels
            notes = [*image.info.items(), *image.getexif().items()]
        return "\n".join(
            f"{key}: {value.decode('latin-1') if isinstance(value, bytes) else value}" for key, value in notes
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":  # base64 of embedded images has slashes of its own
        text = re.sub(r"data:image/[\w.+-]+;base64,[\w+/=]+", "", text)
    if path.suffix == ".json":  # again with escapes such as \u00e9 and \/ decoded
        text += "\n" + json.dumps(json.loads(text), ensure_ascii=False)
    return text


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
    found = {name for name in ids if name in text and _is_an_id(name, text)}
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
    if name.isalpha() or len(name) < (5 if name.isdecimal() else 4):
        pattern = rf"(?<![A-Za-z0-9])(?:I{word}(?!\w)|{word}_\d+(?!\w)|\"{word}\"|'{word}')"
    elif name.isdecimal():
        pattern = rf"(?<![\d.])(?<!\d[eE][+-]){word}(?!\.?\d)"
    else:
        pattern = rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])"
    return re.search(pattern, text) is not None
