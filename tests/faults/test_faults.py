"""The fault script in its short form; `make faults` runs it whole."""

import os
import subprocess
import sys
from pathlib import Path


def test_a_broken_run_goes_on_as_if_nothing_had_happened():
    script = Path(__file__).with_name("run_faults.py")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, str(script), "--short"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all survived" in result.stdout
