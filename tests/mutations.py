"""Mutation testing: break the code behind each claim of the README, and run the tests that should notice.

    make mutants                                              all of them, one after another
    python tests/mutations.py label-dropout vae-ema           these alone
    python tests/mutations.py --list                          names, claims and tests

`mutations.toml` lists the mutations: the claim, the file, the exact text that stands behind the claim, the
text that replaces it, and the tests that should then fail. Each mutation is applied alone to a copy of the
working tree. A mutation is noticed if one of its tests fails; the exit status is 1 if any is not noticed.
A text that does not occur exactly once, a test that does not exist, and a test that fails without a mutation
are errors (exit status 2), so that no entry becomes stale unnoticed.

mutmut and cosmic-ray do not serve here. Both generate their mutants from a fixed set of operators (another
number, another comparison, a dropped `not`) and can be restricted to files or lines, but neither accepts a
given replacement: "the posterior's mean in place of a sample of it" is no operator. Thousands of such
mutants, each with tests that train behind it, would take days; each of these stands for one claim.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutations.toml")
HEADER = "| mutation | claim | noticed by | s |\n| --- | --- | --- | --- |"


class MutationError(Exception):
    """An entry of the list that says nothing about the tests, and why."""


@dataclass(frozen=True)
class Mutation:
    """One line of the code, what replaces it, and the tests that should fail then."""

    name: str
    claim: str  # of the README or the documentation
    file: str  # relative to the root of the repository
    old: str  # occurs exactly once
    new: str
    tests: tuple[str, ...]  # pytest ids

    def mutated(self, source: str) -> str:
        """The source with the mutation.

        Raises:
            MutationError: the old text does not occur exactly once, or the result is no Python.
        """
        if (count := source.count(self.old)) != 1:
            raise MutationError(f"{self.name}: its old text occurs {count} times in {self.file}, not once")
        source = source.replace(self.old, self.new)
        try:
            compile(source, self.file, "exec")
        except SyntaxError as error:
            raise MutationError(f"{self.name}: {self.file} is no Python with it ({error})") from error
        return source


@dataclass(frozen=True)
class Result:
    """What the tests of a mutation did."""

    mutation: Mutation
    noticed_by: str  # id of the test that failed; "" if none did
    seconds: float


def read_list(path: Path = LIST) -> list[Mutation]:
    """The mutations of a list.

    Raises:
        MutationError: two have one name, or one has no test.
    """
    entries = tomllib.loads(path.read_text())["mutation"]
    mutations = [Mutation(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]
    names = [mutation.name for mutation in mutations]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise MutationError(f"{', '.join(sorted(repeated))}: listed twice")
    if untested := [mutation.name for mutation in mutations if not mutation.tests]:
        raise MutationError(f"{', '.join(untested)}: no tests")
    return mutations


def copy_tree(root: Path, target: Path) -> None:
    """Copy what git tracks or would track, as it is in the working tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run_tests(root: Path, tests: Sequence[str], scratch: Path) -> str:
    """Id of the first test that fails; "" if all pass.

    Raises:
        MutationError: pytest could not run them, such as a test that does not exist.
    """
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE"]
    # Bytecode goes by a file's size and its second of change, which a mutation may leave as they are.
    environment = {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "400"}
    result = subprocess.run(
        [*words, f"--basetemp={scratch}", *tests],
        cwd=root,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(scratch, ignore_errors=True)
    if result.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or not failed:
        raise MutationError(f"pytest {' '.join(tests)}:\n{result.stdout}{result.stderr}")
    return failed[1]


def try_mutation(mutation: Mutation, root: Path, scratch: Path) -> Result:
    """Apply the mutation to the copy at `root`, run its tests, and undo it."""
    path, start = root / mutation.file, time.perf_counter()
    source = path.read_text()
    path.write_text(mutation.mutated(source))
    try:
        noticed_by = run_tests(root, mutation.tests, scratch)
    finally:
        path.write_text(source)
    return Result(mutation, noticed_by, time.perf_counter() - start)


def try_all(
    mutations: Sequence[Mutation], root: Path, workers: int = 1, baseline: bool = True
) -> Iterator[Result]:
    """Try each mutation on a copy of `root`, in `workers` copies at once; results come in their order.

    Args:
        baseline: first run all their tests without a mutation.

    Raises:
        MutationError: an entry is stale, or a test fails without a mutation.
    """
    for mutation in mutations:  # all of them before the first test runs
        mutation.mutated((root / mutation.file).read_text())
    with tempfile.TemporaryDirectory(prefix="mutants_") as folder, ThreadPoolExecutor(workers) as pool:
        copies: Queue[Path] = Queue()
        for number in range(workers):
            copies.put(Path(folder, f"copy_{number}"))
            copy_tree(root, Path(folder, f"copy_{number}"))
        if baseline:
            tests = sorted({test for mutation in mutations for test in mutation.tests})
            tqdm.write(f"{len(tests)} tests without a mutation", file=sys.stderr)
            if failed := run_tests(Path(folder, "copy_0"), tests, Path(folder, "tests_0")):
                raise MutationError(f"{failed} fails without a mutation")

        def attempt(mutation: Mutation) -> Result:
            copy = copies.get()
            try:
                return try_mutation(mutation, copy, copy.with_name(copy.name.replace("copy", "tests")))
            finally:
                copies.put(copy)

        yield from tqdm(pool.map(attempt, mutations), total=len(mutations), desc="mutants", unit="")


def row(result: Result) -> str:
    """The line of a result under HEADER."""
    noticed_by = result.noticed_by.partition("::")[2] or "**NOT NOTICED**"
    return f"| {result.mutation.name} | {result.mutation.claim} | {noticed_by} | {result.seconds:.0f} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="mutations to try; all if none is given")
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, and stop")
    parser.add_argument("--workers", type=int, default=1, help="mutations tried at once, a core each")
    parser.add_argument("--no_baseline", action="store_true", help="do not run the tests unmutated first")
    options = parser.parse_args(arguments)
    try:
        mutations = read_list()
        if missing := set(options.names) - {mutation.name for mutation in mutations}:
            raise MutationError(f"{', '.join(sorted(missing))}: no such mutation; see --list")
        chosen = [one for one in mutations if not options.names or one.name in options.names]
        if options.list:
            for mutation in chosen:
                print(f"{mutation.name}: {mutation.claim}\n    " + "\n    ".join(mutation.tests))
            return 0
        print(HEADER, flush=True)
        results = []
        for result in try_all(chosen, ROOT, options.workers, not options.no_baseline):
            results.append(result)
            tqdm.write(row(result))
    except MutationError as error:
        print(f"mutations.py: error: {error}", file=sys.stderr)
        return 2
    unnoticed = [result.mutation.name for result in results if not result.noticed_by]
    print(f"{len(results) - len(unnoticed)} of {len(results)} noticed")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
