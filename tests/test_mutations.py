"""A stale mutation is an error, one that no test notices is reported, and the list fits the present code."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace

import pytest
from mutations import ROOT, Mutation, MutationError, read_list, row, try_all

THIRD = Mutation("third", "halves", "halving.py", "n / 2", "n / 3", ("test_halving.py::test_half",))


@pytest.fixture
def repository(tmp_path):
    """A function with a test that notices a mutation of it, and one that does not."""
    (tmp_path / "halving.py").write_text("def half(n):\n    return n / 2\n")
    tests = ("def test_half():\n    assert half(4) == 2\n", "def test_call():\n    half(4)\n")
    (tmp_path / "test_halving.py").write_text("\n\n".join(["from halving import half\n", *tests]))
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def test_what_is_noticed_and_what_is_not(repository):
    unnoticed = replace(THIRD, name="unnoticed", tests=("test_halving.py::test_call",))
    noticed, not_noticed = try_all([THIRD, unnoticed], repository)
    assert noticed.noticed_by == "test_halving.py::test_half" and not_noticed.noticed_by == ""
    assert "test_half" in row(noticed) and "**NOT NOTICED**" in row(not_noticed)
    assert (repository / "halving.py").read_text().endswith("n / 2\n"), "the tree itself is not touched"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old": "n / 4"}, "occurs 0 times in halving.py"),
        ({"old": "n"}, r"occurs \d+ times in halving.py"),
        ({"new": "n /"}, "is no Python"),
        ({"tests": ("test_halving.py::test_third",)}, "not found"),
    ],
)
def test_a_stale_mutation_is_an_error(change, message, repository):
    with pytest.raises(MutationError, match=message):
        list(try_all([replace(THIRD, **change)], repository, baseline=False))


def test_a_test_that_fails_without_a_mutation_is_an_error(repository):
    (repository / "halving.py").write_text("def half(n):\n    return n / 2 + 1\n")
    with pytest.raises(MutationError, match="test_half fails without a mutation"):
        list(try_all([THIRD], repository))


@pytest.mark.parametrize("mutation", read_list(), ids=lambda mutation: mutation.name)
def test_the_list_is_current(mutation):
    mutation.mutated((ROOT / mutation.file).read_text())
    for test in mutation.tests:
        path, name = re.fullmatch(r"([^:]+)::(\w+)(?:\[.+\])?", test).groups()
        assert f"def {name}(" in (ROOT / path).read_text(), test
