"""Looking through a folder before it leaves the machine: what must not be in it, named.

Searched for in every text file, in the header of every safetensors file and in what a picture's file says
beside its pixels: names of subjects and scans, absolute paths, the user's name, the machine's, and secrets.
Every picture is compared with all pictures of the data, exactly and nearly.
A file that cannot be looked into is a finding as well.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterable, Iterator, Sequence
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

# Bits of 576 that a picture may differ in from one of the data and still be called nearly that. A model that
# has memorized a slice draws it as its autoencoder keeps it: of the demo's cohort, at 64 px, 100 training
# slices differ from their own reconstructions in 8 to 27 bits, and from any slice of another subject in 34 at
# least; the nearest of 1000 drawn slices differs in 36. duplicates.py has figures of copies, and at 256 px.
NEAR = 28

TEXTS = (".json", ".md", ".csv", ".py", ".txt", ".html")
PICTURES = (".png", ".jpg", ".jpeg")

_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9_-]{20,}"
    r"|BEGIN [A-Z ]*PRIVATE KEY"
)
# ADNI's own forms, whatever data are at hand: 002_S_0413, I218391.
_ADNI = re.compile(r"(?<![A-Za-z0-9])(?:\d{3}_S_\d{4,5}|I\d{5,8})(?![A-Za-z0-9])")
# /a/b and not AD/NC, https://a/b or </b>; file:///a; C:\a; ~/a
_PATH = re.compile(
    r"(?<![\w.:/}\])<*~-])/[\w.@+-]+/[\w.@+/-]*\w|\b[A-Za-z]:\\\\?\w[\w\\. -]*|(?<![\w/])~\w*/\w+|file:/+\w+"
)
# Accounts and machines that are called so everywhere tell nothing of anybody.
_COMMON = {
    "root",
    "user",
    "users",
    "admin",
    "ubuntu",
    "debian",
    "runner",
    "home",
    "docker",
    "jovyan",
    "nobody",
}
_COMMON |= {
    "localhost",
    "vm",
    "model",
    "data",
    "train",
    "test",
    "python",
    "main",
    "adni",
    "diffusion",
    "latent",
}


@dataclass(frozen=True)
class SeenData:
    """What of the training data must not be found: names, places, and hashes of the pictures at `size` px."""

    names: frozenset[str]
    places: frozenset[str]
    size: int
    files: tuple[str, ...]  # of the pictures, relative to their data folder
    contents: tuple[bytes, ...]
    hashes: np.ndarray  # uint64 (N, 9)


def hash_data(scans: Sequence[FolderListing], size: int) -> SeenData:
    """Names and hashes of every picture of the data folders, each as training prepares it at `size` px."""
    files = [file for scan in scans for file in scan.files]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda file: _hash_picture(file.path, size), files)
        hashed = list(tqdm(results, total=len(files), desc="hashing the data's pictures", unit="slice"))
    names = {name for file in files for name in (file.subject, file.scan) if name}
    return SeenData(
        names=frozenset(names),
        places=frozenset(str(scan.root) for scan in scans),
        size=size,
        files=tuple(Path(*Path(file.path).parts[-3:]).as_posix() for file in files),
        contents=tuple(content for content, _ in hashed),
        hashes=np.array([bits for _, bits in hashed], np.uint64).reshape(-1, 9),
    )


def look_through(folder: Path, data: SeenData, repo_id: str, allow_real_images: bool = False) -> list[str]:
    """What is in the files below `folder` and must not leave, a line each; [] where there is nothing.

    Args:
        repo_id: its ME may be the user's name, and stands in the cards.
        allow_real_images: pictures are not compared with the data's.
    """
    findings = []
    exact = dict(zip(data.contents, data.files))
    needles = _needles(data)
    paths = sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    for path in tqdm(paths, desc="looking through", unit="file"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.suffix.lower() not in (*TEXTS, *PICTURES, ".safetensors"):
            findings.append(f"{name}: not a kind of file that can be looked into")
            continue
        text = f"{name}\n{_text_of(path)}".replace(repo_id, "")
        findings += [f"{name}: {found}" for found in _found_in(text, data.names, needles)]
        if path.suffix.lower() in PICTURES and not allow_real_images and data.files:
            findings += [f"{name}: {found}" for found in _same_picture(path, data, exact)]
    return findings


def _hash_picture(path: str | Path, size: int) -> tuple[bytes, np.ndarray]:
    grey = Image.fromarray(prepare_image(read_image(path), size))
    return content_hash(grey), difference_hash(grey)


def _same_picture(path: Path, data: SeenData, exact: dict[bytes, str]) -> Iterator[str]:
    content, bits = _hash_picture(path, data.size)
    if content in exact:
        yield f"is the picture {exact[content]} of the data"
        return
    distance = np.bitwise_count(data.hashes ^ bits).sum(axis=1)
    if distance.min() <= NEAR:
        nearest = data.files[int(distance.argmin())]
        yield f"is nearly the picture {nearest} of the data ({distance.min()} of 576 bits differ)"


def _text_of(path: Path) -> str:
    """A text whole; of a safetensors file its header, of a picture what stands beside its pixels."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little")).decode(errors="replace")
    if path.suffix.lower() in PICTURES:
        with Image.open(path) as image:
            image.load()  # text chunks may stand behind the pixels
            notes = [*image.info.items(), *image.getexif().items()]
        return "\n".join(
            f"{key}: {value.decode('latin-1') if isinstance(value, bytes) else value}" for key, value in notes
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".html":  # pictures within it have slashes of their own
        text = re.sub(r"data:image/[\w.+-]+;base64,[\w+/=]+", "", text)
    if path.suffix == ".json":  # once more with \u00e9 and \/ as the letters that they stand for
        text += "\n" + json.dumps(json.loads(text), ensure_ascii=False)
    return text


def _needles(data: SeenData) -> dict[str, str]:
    """What else must not be in a text, word for word: {it: what to call it}."""
    places = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *map(Path, data.places)}
    needles = {str(place): f"path of this machine {str(place)!r}" for place in places if len(place.parts) > 2}
    for name, what in (
        (getpass.getuser(), "user"),
        (Path.home().name, "user"),
        (socket.gethostname(), "machine"),
    ):
        if len(name) > 2 and name.lower() not in _COMMON:
            needles[name] = f"name of the {what} {name!r}"
    secrets = {value for name, value in os.environ.items() if re.search("TOKEN|SECRET|PASSW|API_?KEY", name)}
    secrets.add(get_token() or "")
    return needles | {secret: f"a secret, {secret[:4]}…" for secret in secrets if len(secret) > 7}


def _found_in(text: str, names: Iterable[str], needles: dict[str, str]) -> Iterator[str]:
    told = {name for name in names if name in text and _stands_alone(name, text)}
    told |= set(_ADNI.findall(text))
    yield from (f"subject or scan {name!r}" for name in sorted(told)[:5])
    if len(told) > 5:
        yield f"{len(told) - 5} more subjects or scans"
    for needle, what in needles.items():
        if needle in text and re.search(rf"(?<![A-Za-z0-9]){re.escape(needle)}(?![A-Za-z0-9])", text):
            yield what
    yield from (f"path {path!r}" for path in sorted(set(_PATH.findall(text)))[:5])
    yield from (f"a secret, {secret[:4]}…" for secret in sorted(set(_SECRET.findall(text))))


def _stands_alone(name: str, text: str) -> bool:
    """Whether a name is in a text and not by chance: 1000 may be a step, and I1000 and 1000_78 are scans."""
    word = re.escape(name)
    if name.isalpha() or len(name) < (5 if name.isdecimal() else 4):
        return bool(
            re.search(rf"(?<![A-Za-z0-9])(?:I{word}(?!\w)|{word}_\d+(?!\w)|\"{word}\"|'{word}')", text)
        )
    if name.isdecimal():
        return bool(re.search(rf"(?<![\d.])(?<!\d[eE][+-]){word}(?!\.?\d)", text))
    return bool(re.search(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", text))
