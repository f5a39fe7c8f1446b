"""The four questions of a report and the answers to them, for the report, the web page and the model card.

Nothing but the standard library is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

QUESTIONS = {  # key of `verdicts` in metrics.json: the question
    "fidelity": "Fidelity: do samples match the distribution of real slices?",
    "usefulness": "Train on synthetic, test on real (TSTR): can samples replace real slices for training?",
    "faithfulness": "Class conditioning: do samples show the class they were conditioned on?",
    "privacy": "Privacy: are training images memorized?",
}
NOT_EVALUATED = "Not evaluated."


@dataclass(frozen=True)
class Verdict:
    """The answer to one of QUESTIONS."""

    name: str  # key of QUESTIONS
    good: bool | None  # None: inconclusive
    text: str  # the evidence
    criteria: Sequence[Mapping] = ()  # as `Criterion.to_json`

    @property
    def question(self) -> str:
        return QUESTIONS[self.name]

    @property
    def answer(self) -> str:
        """Yes, No or Inconclusive; the favourable answer to the question on memorization is Not detected."""
        if self.good is None:
            return "Inconclusive"
        if self.name == "privacy":
            return "Not detected" if self.good else "Yes"
        return "Yes" if self.good else "No"

    @property
    def mark(self) -> str:
        """A sign beside the answer: ✓ favourable, ✗ unfavourable, ? inconclusive."""
        return {True: "✓", False: "✗", None: "?"}[self.good]


def list_verdicts(metrics: Mapping) -> Iterator[Verdict]:
    """The verdict on each of QUESTIONS in the content of a metrics.json; inconclusive where it has none."""
    for name in QUESTIONS:
        found = metrics.get("verdicts", {}).get(name) or {"good": None, "text": NOT_EVALUATED}
        yield Verdict(name, found["good"], str(found["text"]), found.get("criteria", ()))
