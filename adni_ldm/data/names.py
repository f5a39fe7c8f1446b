"""Subject, scan and slice in the name of an image file.

    002_S_xxxx_I1001_78.png     ADNI: subject 002_S_xxxx, image ID I1001
    sub-01_ses-02_T1w_78.png    BIDS: subject sub-01
    218391_78.jpeg              AD_NC folder: the image ID of a scan; its subject is not in the name
    ann_78.png                  any other word: the subject

The last number is the slice, and what precedes it names the scan. Of any other name of several words, such as
ann_2_78.png, it cannot be known whether a part names a visit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"(?P<scan>.+)_(?P<slice>\d+)")
_SUBJECTS = (  # of ADNI, anywhere in a name; of BIDS, its first entity
    re.compile(r"(?:.*[_-])?(?P<subject>\d{3}_[Ss]_\d{4,5})(?:[_-].*)?"),
    re.compile(r"(?P<subject>sub-[A-Za-z0-9]+)(?:_.*)?"),
)
_IMAGE_ID = re.compile(r"[Ii]?\d+")  # of an archive
_UNIQUE = re.compile(r"\d{3}_[Ss]_\d{4,5}(?!\d).*|(?:[Ii]|\d)\d{4,}")
_ONE_WORD = re.compile(r"[^\W_]+")
_IMAGE_ID_INSIDE = re.compile(r"(?:.*_)?(?P<id>[Ii]\d+)(?:_.*)?")


@dataclass(frozen=True)
class NameParts:
    """What a file name holds; None where it does not have the form SUBJECT_SLICE."""

    subject: str | None
    scan: str | None
    slice: str  # digits, or empty
    subject_known: bool  # False: the name identifies a scan, which stands for its subject


def parse_name(stem: str) -> NameParts:
    """Parse a file name without its suffix."""
    if not (match := _NAME.fullmatch(stem)):
        return NameParts(None, None, "", False)
    scan, number = match["scan"], match["slice"]
    for pattern in _SUBJECTS:
        if found := pattern.fullmatch(scan):
            return NameParts(found["subject"].replace("_s_", "_S_"), scan, number, True)
    known = bool(_ONE_WORD.fullmatch(scan)) and not _IMAGE_ID.fullmatch(scan)
    return NameParts(scan, scan, number, known)


def image_id(scan: str) -> str:
    """The image ID in the name of a scan, for a study table: 002_S_xxxx_I1001 has I1001; else the name."""
    match = _IMAGE_ID_INSIDE.fullmatch(scan)
    return match["id"] if match else scan


def is_unique(name: str) -> bool:
    """Whether no other study has a subject or scan of this name: 002_S_xxxx, I218xxx; not 001, sub-01."""
    return _UNIQUE.fullmatch(name) is not None
