"""Figures with their uncertainty: the subject is the unit, and nothing is called known that is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
FEWEST_SUBJECTS = 5  # of a class; an interval over fewer says next to nothing
FEWEST_SLICES = 20  # of a class; below that the figures are noise


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval.

    `floor` is what real slices of other subjects reach in the samples' place: nothing can be expected to do
    better. `value` is None where there is too little to say, and `note` says why.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    note: str = ""

    def __post_init__(self):
        for name in ("value", "low", "high", "floor"):
            number = getattr(self, name)
            finite = number is not None and math.isfinite(number)
            object.__setattr__(self, name, float(number) if finite else None)

    def with_floor(self, floor: float | None) -> Estimate:
        return replace(self, floor=floor)

    def to_json(self) -> dict[str, float | str | None]:
        """{"value": …, "low": …, "high": …}, and `floor` and `note` where there are any; never a NaN."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if fields[name] not in (None, "") or name == "value"}


def unknown(note: str) -> Estimate:
    """No figure, and why."""
    return Estimate(None, note=note)


def bootstrap(
    statistic: Callable[..., float], *groups: Sequence, count: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of `statistic` over subjects drawn anew with replacement (Efron 1979).

    Args:
        statistic: of one array of row indices for each of `groups`; may return NaN, which is left out.
        groups: the subject of each row, (N,), for each independent set of rows. All rows of a subject are
            drawn together. Rows that stand alone, such as samples, get a group each: `range(N)`.

    Returns:
        low and high; both NaN where there is nothing to draw from or no draw gives a number.
    """
    rng = np.random.default_rng(seed)
    members = [_rows_by_group(group) for group in groups]
    if not all(members):
        return math.nan, math.nan
    values = []
    for _ in range(count):
        chosen = [
            np.concatenate([rows[index] for index in rng.integers(len(rows), size=len(rows))])
            for rows in members
        ]
        values.append(statistic(*chosen))
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def proportion(hits: int, total: int) -> Estimate:
    """Share of `total` independent trials, with Wilson's interval (Wilson 1927)."""
    if total == 0:
        return unknown("nothing to count")
    interval = stats.binomtest(hits, total).proportion_ci(LEVEL, method="wilson")
    return Estimate(hits / total, interval.low, interval.high)


def _rows_by_group(group: Sequence) -> list[np.ndarray]:
    """The row indices of each group, in the order of the groups' names."""
    _, inverse = np.unique(np.asarray(group), return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    return np.split(order, np.cumsum(np.bincount(inverse))[:-1]) if len(order) else []
