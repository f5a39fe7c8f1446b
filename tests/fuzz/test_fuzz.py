"""200 inputs of each format; `make fuzz` reads 10,000."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import run_fuzz

FORMATS = ("NIfTI", "DICOM", "zip", "PNG", "JPEG", "CSV", "YAML", "safetensors", "model_index")


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_mutated_file_is_read_or_refused_in_one_line(name):
    script = Path(__file__).with_name("run_fuzz.py")
    words = [sys.executable, str(script), name, "--inputs", "200"]
    result = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"| {name} | 200 |" in result.stdout


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    counts = run_fuzz.start_or_continue(tmp_path / "none") | {"at": 195, "accepted": 100, "refused": 95}
    (tmp_path / "JPEG-200.json").write_text(json.dumps(counts) + "\n}")  # as a kill may leave it
    script = str(Path(__file__).with_name("run_fuzz.py"))
    words = [sys.executable, script, "JPEG", "--inputs", "200", "--resume", str(tmp_path)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith("| JPEG"))
    total, refused, accepted = (int(cell) for cell in row.split("|")[2:5])
    assert total == 200 and 95 <= refused <= 100 <= accepted <= 105
    assert not list(tmp_path.iterdir()), "the next run starts anew"


@pytest.mark.parametrize("changed", ["code", "python"])
def test_an_interrupted_run_of_other_code_is_not_continued(tmp_path, changed):
    new = run_fuzz.start_or_continue(tmp_path / "none")
    (tmp_path / "JPEG-200.json").write_text(json.dumps(new | {"at": 195}))
    assert run_fuzz.start_or_continue(tmp_path / "JPEG-200.json")["at"] == 195
    (tmp_path / "JPEG-200.json").write_text(json.dumps(new | {"at": 195, changed: "another"}))
    assert run_fuzz.start_or_continue(tmp_path / "JPEG-200.json")["at"] == 0
