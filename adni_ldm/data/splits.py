"""Assignment of subjects to splits; no two splits share a subject.

`choose_val_subjects` serves a folder without val/: a hash of the name decides, so that no file need record
the choice. `assign_splits` serves a study with ages and sexes: it balances them, and needs the earlier
assignment.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import combinations

import pandas as pd

from adni_ldm.errors import UserError

SPLITS = ("train", "val", "test")


class DataError(UserError):
    """Data that cannot be used; the message, one line, names the path and what to do."""


def subject_fraction(subject: str) -> float:
    """Hash a subject's name to a number, uniform in [0, 1).

    Below the validation fraction, the subject is in validation, on every machine and in every run, and
    whatever other subjects are added.
    """
    return int.from_bytes(hashlib.sha256(subject.encode()).digest()[:6], "big") / 2**48  # 48 bits are exact


def choose_val_subjects(subjects_by_class: Mapping[int, Iterable[str]], fraction: float) -> set[str]:
    """Choose about `fraction` of the subjects for validation, by `subject_fraction`.

    Of a class with two subjects or more, each set has at least one: where it would be empty, the subject with
    the smallest (validation) or the largest number (training) is moved there. The one subject of a class
    stays in training.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction={fraction} must lie between 0 and 1")
    ordered = {label: sorted(set(names), key=subject_fraction) for label, names in subjects_by_class.items()}
    chosen = {name for names in ordered.values() for name in names if subject_fraction(name) < fraction}
    chosen |= {names[0] for names in ordered.values() if len(names) > 1 and not chosen.intersection(names)}
    # After the additions: a subject of two classes may have been added for one and be the last of the other.
    chosen -= {names[-1] for names in ordered.values() if names and chosen.issuperset(names)}
    return chosen


def assign_splits(
    subjects: pd.DataFrame,
    fractions: Mapping[str, float],
    fixed: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Assign the rows of `subjects`, columns subject, label, age (years or NaN) and sex (or NaN), to splits.

    Balancing a small cohort moves subjects when others are added. So an earlier assignment is given as
    `fixed` (`manifest_splits` of the data's manifest, or a predefined test set) and kept, and only the others
    are assigned. The result does not depend on the order of the rows; without `fixed`, adding subjects may
    move some.

    Every class gets its share of each split to one subject, and one at least where it has as many subjects as
    there are splits. Within the class, each subject in turn, in the order of `subject_fraction`, goes where
    subjects of the same sex and the same sixth of the class by age are furthest below their share:
    minimization (Pocock & Simon 1975, doi:10.2307/2529712). `fractions` are relative: {"train": 0.7, "val":
    0.15, "test": 0.15}; a split without a fraction gets only fixed subjects.

    Raises:
        ValueError: a subject has two rows, or a fraction or a fixed split is invalid.
    """
    fixed = dict(fixed or {})
    if unknown := sorted({*fractions, *fixed.values()} - set(SPLITS)):
        raise ValueError(f"no split {', '.join(unknown)}; there is {', '.join(SPLITS)}")
    if not fractions or any(not share > 0 for share in fractions.values()):
        raise ValueError(f"fractions={dict(fractions)}: give each split a share above 0")
    if repeated := sorted(subjects.subject[subjects.subject.duplicated()].unique()):
        raise ValueError(f"subjects in two rows: {', '.join(repeated[:10])}; give one row per subject")
    shares = {split: share / sum(fractions.values()) for split, share in fractions.items()}
    return {
        subject: split
        for _, members in subjects.groupby("label", sort=True)
        for subject, split in _assign_class(members, shares, fixed).items()
    }


def _assign_class(
    members: pd.DataFrame, shares: Mapping[str, float], fixed: Mapping[str, str]
) -> dict[str, str]:
    """`assign_splits` for the subjects of one class."""
    age = pd.to_numeric(members.age, errors="coerce")
    sixth = pd.qcut(age, 6, labels=False, duplicates="drop") if age.nunique() > 1 else age * 0
    strata = {
        subject: (("sex", str(sex)), ("age", str(band)))
        for subject, sex, band in zip(members.subject, members.sex, sixth, strict=True)
    }
    splits = {subject: fixed[subject] for subject in strata if subject in fixed}
    new = sorted(set(strata) - set(splits), key=lambda name: (subject_fraction(name), name))

    pool = [subject for subject in strata if subject not in splits or splits[subject] in shares]
    wanted = Counter(stratum for subject in pool for stratum in strata[subject])
    given = Counter((split, stratum) for subject, split in splits.items() for stratum in strata[subject])
    free = _places(shares, Counter(splits.values()), len(new))
    for subject in new:

        def lack(split, subject=subject):
            return sum(shares[split] * wanted[s] - given[split, s] for s in strata[subject])

        splits[subject] = max((split for split in free if free[split]), key=lack)  # a tie: the first split
        free[splits[subject]] -= 1
        given.update((splits[subject], stratum) for stratum in strata[subject])
    return splits


def _places(shares: Mapping[str, float], taken: Counter[str], count: int) -> Counter[str]:
    """How many of `count` new subjects each split gets: one at a time, to the split furthest below its share.

    An empty split comes first, train before test before val.
    """
    total = sum(taken[split] for split in shares) + count
    order = sorted(shares, key=("train", "test", "val").index)
    places: Counter[str] = Counter()
    for _ in range(count):
        lacks = {split: shares[split] * total - taken[split] - places[split] for split in order}
        empty = [split for split in order if not taken[split] + places[split]]
        places[empty[0] if empty else max(order, key=lacks.__getitem__)] += 1
    return places


def shared_subjects(subjects_by_split: Mapping[str, Iterable[str]]) -> dict[tuple[str, str], list[str]]:
    """Find the subjects of two splits, sorted, for each pair of splits that shares any."""
    sets = {split: set(names) for split, names in subjects_by_split.items()}
    shared = {(a, b): sorted(sets[a] & sets[b]) for a, b in combinations(sets, 2)}
    return {pair: names for pair, names in shared.items() if names}
