"""Duplicates and near-duplicates across subjects or splits.

Near-duplicates are found by a difference hash (dHash, N. Krawetz, hackerfactor.com): the
image is averaged to 25 x 24 cells, and each of 576 bits is set if a cell is darker than its right neighbour
by more than 2 of 255. The usual 64 bits are too few: slices of different subjects can agree in all of them.
Of 576 bits, slices of two subjects of the phantom, at 256 px, differ in 110 (median; minimum 30 in 2.8
million pairs). A slice and its copy differ in 2 or 3 bits after JPEG at quality 75, a change of gain or
gamma, or noise (maximum 10), in 11 after halving its size (22) and in 14 after a shift by one pixel (25). Up
to 20 bits count as near. Copies that are cropped, shifted further, rotated or mirrored are not found; of
copies at 64 px after JPEG, two thirds are.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from adni_ldm.data.folder import SliceFile

CELLS = 24  # per side
WORDS = CELLS * CELLS // 64
NEAR = 20  # bits by which near-duplicates may differ
_DARKER = 2  # of 255: JPEG noise on black sets no bits
_FLAT = 48  # bits: an image with fewer is too uniform to compare
_ORDER = np.random.default_rng(0).permutation(CELLS * CELLS)  # so that any words sample the whole image
_FIRST = 3  # words that are compared first
_BLOCK = 512


@dataclass(frozen=True)
class Pair:
    """Two files with the same image, and how many more pairs the same two subjects and splits have."""

    first: SliceFile
    second: SliceFile
    more: int = 0


def content_hash(grey: Image.Image) -> bytes:
    """Hash the pixels of an image (mode L) to 16 bytes, whatever the format of its file."""
    return hashlib.blake2b(grey.tobytes(), digest_size=16, salt=repr(grey.size).encode()[:16]).digest()


def difference_hash(grey: Image.Image) -> np.ndarray:
    """Compute the dHash of an image (mode L): uint64 (9,)."""
    cells = np.asarray(grey.resize((CELLS + 1, CELLS), Image.Resampling.BOX), dtype=np.int16)
    bits = (cells[:, 1:] - cells[:, :-1] > _DARKER).ravel()[_ORDER]
    return np.packbits(bits).view(np.uint64)


def find_duplicates(
    files: Sequence[SliceFile], contents: Sequence[bytes], hashes: np.ndarray
) -> tuple[list[Pair], list[Pair]]:
    """Find duplicates and near-duplicates across subjects or splits, one pair for each two of these.

    `contents` and `hashes` (N, 9) are `content_hash` and `difference_hash` of the files. Neighbouring slices
    of a subject in one split do not count. 30,000 images take some seconds: every pair is compared.
    """
    same_content: dict[bytes, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        same_content[content].append(index)
    exact = [pair for same in same_content.values() for pair in zip(same, same[1:])]
    unique = np.array([same[0] for same in same_content.values()], dtype=np.int64)
    unique = unique[np.bitwise_count(hashes[unique]).sum(1) >= _FLAT]
    near = unique[near_pairs(hashes[unique])]
    return _by_subjects(files, exact), _by_subjects(files, near.tolist())


def near_pairs(hashes: np.ndarray, most: int = NEAR) -> np.ndarray:
    """Find the index pairs (P, 2), i < j, of the hashes uint64 (N, 9) that differ in `most` bits or fewer."""
    found = [np.empty((0, 2), np.int64)]
    words = np.ascontiguousarray(hashes.T)  # (9, N)
    count = words.shape[1]
    for top in range(0, count, _BLOCK):
        rows = words[:, top : top + _BLOCK, None]
        for left in range(top, count, _BLOCK):
            columns = words[:, None, left : left + _BLOCK]
            distance = np.bitwise_count(rows[0] ^ columns[0])  # uint8 (rows, columns): at most 192 by three
            for word in range(1, _FIRST):
                distance += np.bitwise_count(rows[word] ^ columns[word])
            i, j = np.nonzero(distance <= most)
            i, j = i + top, j + left
            i, j = i[i < j], j[i < j]
            whole = np.bitwise_count(hashes[i] ^ hashes[j]).sum(1)
            found.append(np.stack([i, j], axis=1)[whole <= most])
    return np.concatenate(found)


def _by_subjects(files: Sequence[SliceFile], pairs: Sequence[tuple[int, int]]) -> list[Pair]:
    """One pair for each two (split, subject) that share images; none within one."""
    groups: dict[tuple, list[tuple[SliceFile, SliceFile]]] = defaultdict(list)
    for i, j in pairs:
        first, second = sorted((files[i], files[j]), key=lambda file: file.path)
        owners = ((first.split, first.subject), (second.split, second.subject))
        if owners[0] != owners[1]:
            groups[tuple(sorted(owners, key=str))].append((first, second))
    return [Pair(*group[0], more=len(group) - 1) for group in groups.values()]
