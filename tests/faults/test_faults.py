"""The fault script in its short form; `make faults` runs it whole."""

import os
import subprocess
import sys
from pathlib import Path

from tiny_runs import steps_lost

ROOT = Path(__file__).parents[2]


def run(*command) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_a_broken_run_goes_on_as_if_nothing_had_happened():
    assert "all survived" in run(ROOT / "tests/faults/run_faults.py", "--short")


def test_killed_preparation_goes_on_as_if_nothing_had_happened(tmp_path):
    """The script of `make faults`, on the quickest command: kills, and power cuts at half of them."""
    script = (ROOT / "benchmarks/faults.py", "--commands", "prepare_data", "--out", tmp_path)
    said = run(*script, "--kills", 6)
    assert "6 kills, 6 survived" in said and list(tmp_path.glob("faults_*.md"))


def test_steps_are_lost_only_where_a_run_is_trained_again():
    assert steps_lost(5, before=[0], after=[0, 4]) == 1
    assert steps_lost(6, before=[0], after=[0]) == 0, "already finished: there is no start"
    assert steps_lost(6, before=[0, 4], after=[0, 4, 6]) == 0
    assert steps_lost(1, before=[], after=[0]) == 1
