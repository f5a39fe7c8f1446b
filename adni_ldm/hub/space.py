"""app.py as a Hugging Face Space: a folder with the page, the package, and what both need."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

import gradio
import yaml
from huggingface_hub import HfApi
from packaging.requirements import Requirement

import adni_ldm
from adni_ldm.errors import UserError

CARD = """---
title: Brain slices by diagnosis
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
models:
- {model}
---

Draws brain MRI slices of the class asked for with [{model}](https://huggingface.co/{model}). For research;
not for diagnosis. Made with `python app.py --model {model} --push_space ME/NAME`.
"""


def push_space(repo_id: str, app: Path, model: str, public: bool) -> str:
    """Make the Space `repo_id` of the page `app` for a model of the Hub; returns its address.

    Raises:
        UserError: the model is a folder, or what `push_folder` raises.
    """
    if Path(model).exists() or model.count("/") != 1:
        raise UserError(
            f"--model {model} is not on the Hub, and a Space reads its model from there: "
            "push it with python -m adni_ldm.hub push, and give --model ME/MODEL"
        )
    from adni_ldm.hub.push import push_folder

    with tempfile.TemporaryDirectory(prefix="adni_ldm_space_") as folder:
        write_space(Path(folder), app, model)
        return push_folder(HfApi(), Path(folder), repo_id, "space", public)


def write_space(folder: Path, app: Path, model: str) -> None:
    """What the Space holds: app.py, app.yaml with the model's name, the package, and files of the Hub's."""
    shutil.copyfile(app, folder / "app.py")
    (folder / "app.yaml").write_text(yaml.safe_dump({"model": model}))
    package = Path(adni_ldm.__file__).parent
    shutil.copytree(package, folder / "adni_ldm", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements.txt").write_text("\n".join(requirements()) + "\n")
    (folder / "README.md").write_text(CARD.format(gradio=gradio.__version__, model=model))


def requirements() -> list[str]:
    """What the package needs, in the versions that are installed here; gradio comes by `sdk_version`."""
    wanted = [Requirement(line) for line in requires("adni-ldm") or ()]
    needed = [entry.name for entry in wanted if not entry.marker]
    return [f"{name}=={version(name).partition('+')[0]}" for name in needed]
