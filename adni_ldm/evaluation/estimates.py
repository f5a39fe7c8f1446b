"""Estimates with confidence intervals, and tests of equivalence; the unit of resampling is the subject.

A verdict rests on criteria. A criterion is a quantity with limits, inside of which samples count as
equivalent to real slices. It is met if the 90 % interval lies inside the limits, which is the pair of
one-sided tests of Schuirmann 1987 (TOST) at 5 % each, not met if it lies outside, and undecided else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy import sparse, stats

LEVEL = 0.95  # confidence level of the intervals that are shown
TEST_LEVEL = 0.9  # of the intervals that decide: two one-sided tests at 5 % each
FEWEST_SUBJECTS = 10  # of a class; an interval over fewer subjects is not informative
FEWEST_SLICES = 20  # of a class; metrics of fewer slices are dominated by noise


@dataclass(frozen=True)
class Estimate:
    """An estimate with its 95 % confidence interval, and the 90 % interval of equivalence tests.

    `reference` is the value that real slices of other subjects reach in the samples' place. `value` is None
    where the data are insufficient; `note` gives the reason. NaN and infinity become None.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    reference: float | None = None
    note: str = ""
    low_90: float | None = None
    high_90: float | None = None

    def __post_init__(self):
        for name in ("value", "low", "high", "reference", "low_90", "high_90"):
            number = getattr(self, name)
            finite = number is not None and math.isfinite(number)
            object.__setattr__(self, name, float(number) if finite else None)

    def with_reference(self, reference: float | None) -> Estimate:
        return replace(self, reference=reference)

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` times the quantity, without a reference; factor above 0."""
        numbers = (self.value, self.low, self.high, self.low_90, self.high_90)
        value, low, high, low_90, high_90 = (one if one is None else factor * one for one in numbers)
        return Estimate(value, low, high, note=self.note, low_90=low_90, high_90=high_90)

    def to_json(self) -> dict[str, float | str | None]:
        """{"value": …, "low": …, "high": …}, and `reference` and `note` where they are set."""
        fields = asdict(self)
        return {name: fields[name] for name in fields if fields[name] not in (None, "") or name == "value"}


def unknown(note: str) -> Estimate:
    """An estimate without a value; `note` gives the reason."""
    return Estimate(None, note=note)


def estimate(draws: np.ndarray, note: str = "") -> Estimate:
    """A statistic of `Resamples` (B + 1,), of which the first is the value, with percentile intervals (Efron
    1979) of the others. NaN is left out."""
    value, finite = draws[0], draws[1:][np.isfinite(draws[1:])]
    if not np.isfinite(value):
        return unknown(note or "not defined: what it is relative to is zero")
    if not len(finite):
        return Estimate(value, note=note)
    tails = [(1 - level) / 2 for level in (LEVEL, TEST_LEVEL)]
    low, low_90, high_90, high = np.quantile(finite, [*tails, *(1 - tail for tail in reversed(tails))])
    return Estimate(value, low, high, note=note, low_90=low_90, high_90=high_90)


@dataclass(frozen=True)
class Resamples:
    """Bootstrap samples of the subjects of N rows, drawn with replacement.

    All rows of a subject are drawn together. Independent rows, such as samples, are subjects of their own.
    The first of the B + 1 samples has every subject once: a statistic comes first as it is. Statistics of
    several sets are independent if their seeds differ, and paired if sets, seeds and counts are the same.
    """

    subjects: sparse.csr_array  # (S, N): which rows a subject has
    times: np.ndarray  # (B + 1, S): how often a bootstrap sample has the subject

    @classmethod
    def draw(cls, subjects: Sequence, count: int = 1000, seed: int | Sequence[int] = 0) -> Resamples:
        """`count` bootstrap samples; `subjects` (N,) names the subject of each row."""
        names, codes = np.unique(np.asarray(subjects), return_inverse=True)
        rows = sparse.csr_array(
            (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(names), len(codes))
        )
        number = len(names)
        if not number:
            return cls(rows, np.ones((count + 1, 0)))
        drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), count)
        return cls(rows, np.vstack([np.ones((1, number)), drawn]))

    def rows(self) -> Iterator[np.ndarray]:
        """Rows of each bootstrap sample, with repetitions; for statistics that are no sums."""
        for times in self.times:
            yield np.repeat(np.arange(self.subjects.shape[1]), (times @ self.subjects).astype(int))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum (B + 1,) of values (N,) in each bootstrap sample."""
        return self.times @ (self.subjects @ np.asarray(values, dtype=float))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean (B + 1,); NaN where a bootstrap sample has no row."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.sum(values) / self.sum(np.ones(len(values)))

    def deviation(self, values: np.ndarray) -> np.ndarray:
        """Standard deviation (B + 1,), with N - 1 in the denominator."""
        centred = np.asarray(values, dtype=float) - np.mean(values)  # against cancellation
        rows = self.sum(np.ones(len(values)))
        with np.errstate(invalid="ignore", divide="ignore"):
            variance = self.mean(centred**2) - self.mean(centred) ** 2
            variance[variance < 1e-12 * np.mean(centred**2)] = 0  # below rounding
            return np.sqrt(variance * rows / (rows - 1))


def proportion(hits: float, total: float) -> Estimate:
    """Proportion of `total` independent trials, with Wilson's score interval (Wilson 1927).

    The number of hits need not be an integer: a share of clustered rows may stand for so many trials.
    """
    if total == 0:
        return unknown("no observations")
    wide, narrow = (_wilson(hits / total, total, level) for level in (LEVEL, TEST_LEVEL))
    return Estimate(hits / total, *wide, low_90=narrow[0], high_90=narrow[1])


def _wilson(share: float, total: float, level: float) -> tuple[float, float]:
    z = stats.norm.ppf((1 + level) / 2)
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_proportion(hits: np.ndarray, subjects: np.ndarray) -> Estimate:
    """Share of rows (N,) that are true, with Wilson's interval for as many trials as there are subjects.

    Rows of one subject may all be alike, so they count as one.
    """
    share, count = float(np.mean(hits)), len(np.unique(subjects))
    return proportion(share * count, count)


def difference_of_proportions(one: Estimate, other: Estimate) -> Estimate:
    """one - other of independent proportions, with the hybrid score interval of Newcombe 1998, method 10."""
    difference = one.value - other.value

    def bounds(low: float, high: float, other_low: float, other_high: float) -> tuple[float, float]:
        below = math.hypot(one.value - low, other_high - other.value)
        above = math.hypot(high - one.value, other.value - other_low)
        return difference - below, difference + above

    wide = bounds(one.low, one.high, other.low, other.high)
    narrow = bounds(one.low_90, one.high_90, other.low_90, other.high_90)
    return Estimate(difference, *wide, low_90=narrow[0], high_90=narrow[1])


def roc_auc(cases: np.ndarray, others: np.ndarray) -> float:
    """Area under the ROC curve: P(case > other) + ½ P(case = other), from scores (N,) and (M,).

    The Mann-Whitney U statistic over N · M. NaN if either is empty. scikit-learn's roc_auc_score returns the
    same value, but takes 5 to 200 times as long, and the bootstrap evaluates it thousands of times.
    """
    if not len(cases) or not len(others):
        return math.nan
    ranks = stats.rankdata(np.concatenate([cases, others]))[: len(cases)]
    wins = ranks.sum() - len(cases) * (len(cases) + 1) / 2
    return float(wins / (len(cases) * len(others)))


@dataclass(frozen=True)
class Criterion:
    """A quantity of the samples, and the limits inside of which they count as equivalent to real slices."""

    name: str
    estimate: Estimate
    low: float = -math.inf
    high: float = math.inf
    required: bool = True  # False: counts only where it is not met
    interval: tuple[float | None, float | None] | None = None  # that decides; None: the 90 % one

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The interval that decides; None where there is none."""
        return self.interval or (self.estimate.low_90, self.estimate.high_90)

    @property
    def met(self) -> bool | None:
        """True if the interval lies inside the limits, False if outside, None if it reaches across."""
        low, high = self.bounds
        if low is None or high is None:
            return None
        if self.low <= low and high <= self.high:
            return True
        return False if high < self.low or low > self.high else None

    @property
    def more_data(self) -> float | None:
        """By what factor more subjects and samples the interval would lie inside, at this value; None if the
        value itself lies outside. The width of an interval goes with the root of the numbers."""
        value, (low, high) = self.estimate.value, self.bounds
        if value is None or low is None or not self.low < value < self.high:
            return None
        return max(
            1.0, ((value - low) / (value - self.low)) ** 2, ((high - value) / (self.high - value)) ** 2
        )

    def __str__(self) -> str:
        """As in: name 1.37 (1.21 to 1.55; limits 0.7 to 1.4)."""
        found, (low, high) = self.estimate, self.bounds
        if found.value is None:
            return f"{self.name} ({found.note or 'not measured'})"
        text = f"{self.name} {found.value:.2g}"
        if low is None:
            return text
        finite = math.isfinite(self.low), math.isfinite(self.high)
        limits = {
            (True, True): f"limits {self.low:g} to {self.high:g}",
            (True, False): f"at least {self.low:g}",
            (False, True): f"at most {self.high:g}",
        }[finite]
        return f"{text} ({low:.2g} to {high:.2g}; {limits})"

    def to_json(self) -> dict:
        """{"criterion": …, "value": …, "low": …, "high": …, "limits": [low, high], "met": …}.

        `low` to `high` is the interval that decides, `bounds`.
        """
        limits = [limit if math.isfinite(limit) else None for limit in (self.low, self.high)]
        found = {"value": self.estimate.value, **dict(zip(("low", "high"), self.bounds))}
        return {"criterion": self.name, **found, "limits": limits, "met": self.met}


def decide(criteria: Sequence[Criterion]) -> bool | None:
    """False if a criterion is not met; True if every required one is; None if the data cannot decide."""
    if any(one.met is False for one in criteria):
        return False
    return True if all(one.met for one in criteria if one.required) else None
