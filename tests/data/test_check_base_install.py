"""Quality control and loading of slices need none of the packages that only extras bring."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT_EXTRAS = """
import importlib.machinery, sys
EXTRAS = "scipy sklearn monai nilearn nibabel pydicom SimpleITK umap gradio peft".split()
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in EXTRAS else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
import prepare_data
from adni_ldm.errors import run_recipe
"""


def run(code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_EXTRAS + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_check_runs_with_the_base_install(ad_nc_folder, tmp_path):
    arguments = [str(ad_nc_folder()), "--figures", str(tmp_path / "figures")]
    result = run(f"run_recipe(lambda: prepare_data.check({arguments}))")
    assert result.returncode == 0, result.stderr
    assert "images" in result.stdout and (tmp_path / "figures/contact_sheet.png").is_file()


@pytest.mark.parametrize("command", ["phantom", "scans"])
def test_commands_that_need_an_extra_name_it_in_one_line(tmp_path, command):
    arguments = ["--output_dir", str(tmp_path / "data")]
    result = run(f"run_recipe(lambda: prepare_data.{command}({arguments}))")
    assert result.returncode == 1 and "pip install 'adni-ldm[scans]'" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "data").exists()
