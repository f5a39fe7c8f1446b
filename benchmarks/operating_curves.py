"""How often each verdict is yes, no or inconclusive: for samples of the true population, and with each fault.

    python benchmarks/operating_curves.py --output benchmarks/results/operating_curves.md

Cohorts are simulated (simulated_cohorts.py), so the tables show what the statistics can decide from so many
subjects and samples, not what a network's features resolve: that is verdict_battery.py's to show.
"""

from __future__ import annotations

import argparse
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from simulated_cohorts import FAULTS, ICC, SLICES, simulated_verdicts
from tqdm.auto import tqdm

SUBJECTS = (20, 50, 100, 200)  # of each class, held out
COHORTS = (30, 30, 200, 10)  # simulated for each of these, of samples of the true population
FAULTY = (10, 10, 200, 5)  # and with each fault


def count_answers(
    pool: ProcessPoolExecutor, question: str, fault: str, cohorts: int, **options
) -> Counter[bool | None]:
    """The verdicts on `question` over `cohorts` simulated cohorts."""
    one = partial(_answer, question=question, fault=fault, options=options)
    return Counter(pool.map(one, range(cohorts), chunksize=4))


def _answer(seed: int, question: str, fault: str, options: dict) -> bool | None:
    return simulated_verdicts(fault, seed, questions=(question,), **options)[question]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", type=int, nargs="+", default=SUBJECTS, help="of each class, held out")
    parser.add_argument("--cohorts", type=int, nargs="+", default=COHORTS, help="for each of --subjects")
    parser.add_argument("--faulty", type=int, nargs="+", default=FAULTY, help="the same, with a fault")
    parser.add_argument("--effects", type=float, nargs="+", default=[2.0], help="Cohen's d of the disease")
    parser.add_argument("--questions", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, help="write the tables here too")
    options = parser.parse_args()

    rows = [  # the numbers of subjects that matter most come first
        (d, question, fault, subjects)
        for d in options.effects
        for subjects in sorted(options.subjects, key=lambda count: abs(count - 100))
        for question in options.questions
        for fault in ("perfect", *FAULTS[question])
        if d == options.effects[0] or question in ("usefulness", "faithfulness")  # the others know no d
    ]
    numbers = {
        subjects: {True: good, False: bad}
        for subjects, good, bad in zip(options.subjects, options.cohorts, options.faulty, strict=True)
    }
    found: dict[tuple, Counter] = {}
    with ProcessPoolExecutor(options.workers) as pool:
        for d, question, fault, subjects in tqdm(rows, desc="operating curves"):
            number = numbers[subjects][fault == "perfect"]
            found[d, question, fault, subjects] = count_answers(
                pool, question, fault, number, subjects=subjects, d=d, draws=200
            )
            if options.output:  # after every row, as it takes long
                options.output.write_text(make_tables(found, numbers))
    print(make_tables(found, numbers))


def make_tables(found: dict[tuple, Counter], numbers: dict[int, dict[bool, int]]) -> str:
    """A table for each d: questions and faults down, numbers of subjects across."""
    lines = [
        "# Operating characteristics of the verdicts",
        "",
        f"Simulated cohorts of {SLICES} slices a subject, intraclass correlation {ICC}, as many training as "
        "held-out subjects, and 500 samples a class. d is Cohen's d of the disease on the ventricle and on "
        "one of 16 features. Shares of cohorts, %: yes / inconclusive / no.",
    ]
    columns = " | ".join(
        f"{subjects} subjects a class ({one[True]} cohorts, {one[False]} with each fault)"
        for subjects, one in numbers.items()
    )
    for d in dict.fromkeys(key[0] for key in found):
        lines += ["", f"## d = {d:g}", "", f"| verdict | samples | {columns} |"]
        lines += ["| --- " * (2 + len(numbers)) + "|"]
        for question, fault in dict.fromkeys(key[1:3] for key in found if key[0] == d):
            cells = []
            for subjects in numbers:
                counts = found.get((d, question, fault, subjects), Counter())
                shares = [
                    f"{100 * counts[answer] / (counts.total() or 1):.0f}" for answer in (True, None, False)
                ]
                cells.append(" / ".join(shares) if counts else "–")
            lines.append(f"| {question} | {fault} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
