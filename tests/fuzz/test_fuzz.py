"""200 inputs of each format; `make fuzz` reads 10,000."""

import subprocess
import sys
from pathlib import Path

import pytest

FORMATS = ("NIfTI", "DICOM", "zip", "PNG", "JPEG", "CSV", "YAML", "safetensors", "model_index")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name):
    script = Path(__file__).with_name("run_fuzz.py")
    words = [sys.executable, str(script), name, "--inputs", "200"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"| {name} | 200 |" in result.stdout
