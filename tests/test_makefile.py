"""Targets of the Makefile whose words and exit status others rely on."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("said", "status", "fails", "words"),
    [
        ("No known vulnerabilities found", 0, False, ""),
        ("Found 2 known vulnerabilities in 1 package", 1, True, "Found 2 known vulnerabilities"),
        (
            "No known vulnerabilities found\nName Skip Reason\n"
            "torch Dependency not found on PyPI and could not be audited: torch (2.10)",
            0,
            True,
            "make: audit: not all versions could be looked up from here",
        ),
        (
            "requests.exceptions.ProxyError: no route",
            1,
            True,
            "make: audit: the advisories cannot be reached",
        ),
        ("", 0, True, "make: audit: the advisories cannot be reached"),
        (None, 0, True, "make: audit needs pip-audit"),
    ],
)
def test_an_audit_that_looked_up_nothing_says_so_and_fails(tmp_path, said, status, fails, words):
    """With a stand-in for pip-audit, which prints what pip-audit 2 prints; None: it is not installed."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "tail", "make"):
        (tools / name).symlink_to(shutil.which(name))
    if said is not None:
        (tmp_path / "said").write_text(said + "\n")
        (tools / "pip-audit").write_text(f'#!{tools}/bash\necho "$(< {tmp_path}/said)"\nexit {status}\n')
        (tools / "pip-audit").chmod(0o755)
    result = subprocess.run(
        [tools / "make", "audit"], cwd=ROOT, env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert bool(result.returncode) == fails, result.stdout + result.stderr
    assert words in result.stdout + result.stderr
