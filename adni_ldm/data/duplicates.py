"""The same picture under two subjects or in two splits: exactly, and nearly.

Near is measured by a difference hash (dHash, hackerfactor.com/blog/index.php?/archives/529): the picture is
averaged down to 25 x 24 cells, and each of 576 bits says whether a cell is darker than its right neighbour by
more than 2 of 255. Its usual form has 64 bits, which are too few here: all brains are alike, and slices of
different people agree in all 64. Of 576 bits, slices of two people of the phantom, at 256 px, differ in 110
(median; 30 at least in 2.8 million pairs); a slice and its copy differ in 2 or 3 after JPEG at quality 75, a
change of gain or gamma, or noise (10 at most), in 11 after halving its size (22) and in 14 after a move by
one pixel (25). Up to 20 count as near. A copy that is cropped, moved further, turned or mirrored is not
found, and of one at 64 px that went through JPEG two thirds are.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from adni_ldm.data.folder import SliceFile

CELLS = 24  # a side
WORDS = CELLS * CELLS // 64
NEAR = 20  # bits that two pictures may differ in and still be called nearly the same
_DARKER = 2  # of 255: the noise of JPEG on black sets no bits
_FLAT = 48  # bits: a picture with fewer has nothing to recognize it by
_ORDER = np.random.default_rng(0).permutation(CELLS * CELLS)  # so that any words sample the whole picture
_FIRST = 3  # words that are compared before the others
_BLOCK = 512


@dataclass(frozen=True)
class Pair:
    """Two files with the same picture, and how many more there are of the same two subjects and splits."""

    first: SliceFile
    second: SliceFile
    more: int = 0


def content_hash(grey: Image.Image) -> bytes:
    """16 bytes that tell a picture (mode L) from every other, whatever format its file has."""
    return hashlib.blake2b(grey.tobytes(), digest_size=16, salt=repr(grey.size).encode()[:16]).digest()


def difference_hash(grey: Image.Image) -> np.ndarray:
    """dHash of a picture (mode L): uint64 (9,)."""
    cells = np.asarray(grey.resize((CELLS + 1, CELLS), Image.Resampling.BOX), dtype=np.int16)
    bits = (cells[:, 1:] - cells[:, :-1] > _DARKER).ravel()[_ORDER]
    return np.packbits(bits).view(np.uint64)


def find_duplicates(
    files: Sequence[SliceFile], contents: Sequence[bytes], hashes: np.ndarray
) -> tuple[list[Pair], list[Pair]]:
    """Pairs of the same picture, and of nearly the same, across subjects or splits; one pair for each two.

    `contents` and `hashes` (N, 9) are `content_hash` and `difference_hash` of the files. Neighbouring slices
    of one subject in one split are no duplicates. 30,000 pictures take some seconds: every pair is compared.
    """
    alike: dict[bytes, list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        alike[content].append(index)
    exact = [pair for same in alike.values() for pair in zip(same, same[1:])]
    unique = np.array([same[0] for same in alike.values()], dtype=np.int64)
    unique = unique[np.bitwise_count(hashes[unique]).sum(1) >= _FLAT]
    near = unique[near_pairs(hashes[unique])]
    return _by_subjects(files, exact), _by_subjects(files, near.tolist())


def near_pairs(hashes: np.ndarray, most: int = NEAR) -> np.ndarray:
    """Index pairs (P, 2), i < j, of the hashes uint64 (N, 9) that differ in `most` bits or fewer."""
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
    """One pair for each two (split, subject) that share pictures; none within one."""
    groups: dict[tuple, list[tuple[SliceFile, SliceFile]]] = defaultdict(list)
    for i, j in pairs:
        first, second = sorted((files[i], files[j]), key=lambda file: file.path)
        whose = ((first.split, first.subject), (second.split, second.subject))
        if whose[0] != whose[1]:
            groups[tuple(sorted(whose, key=str))].append((first, second))
    return [Pair(*group[0], more=len(group) - 1) for group in groups.values()]
