"""app.py as a Hugging Face Space: a folder with the page, the package, and their requirements."""

from __future__ import annotations

import shutil
import tempfile
from importlib.metadata import requires, version
from pathlib import Path

import gradio
import yaml
from packaging.requirements import Requirement

import adni_ldm
from adni_ldm.errors import UserError
from adni_ldm.hub.leak_scan import check_leaks, index_training_data
from adni_ldm.hub.upload import upload_folder

PACKAGE = (".py", ".md", ".jinja")  # what the package consists of; data beside it stays here
CARD = """---
title: Brain MRI slices by diagnosis
sdk: gradio
sdk_version: {gradio}
python_version: "3.12"
app_file: app.py
models:
- {model}
---

Samples brain MRI slices conditioned on diagnosis with the latent diffusion model
[{model}](https://huggingface.co/{model}). For research only, not for diagnosis. Created with
`python app.py --model {model} --push_space ME/NAME`.
"""


def push_space(repo_id: str, app: Path, model: str, public: bool) -> str:
    """Create the Space `repo_id` of the page `app` for a model on the Hub; returns its URL.

    Raises:
        UserError: the model is a folder, the leak scan found something, or as `upload_folder`.
    """
    if Path(model).exists() or model.count("/") != 1:
        raise UserError(
            f"--model {model} is not on the Hub, from where a Space loads its model: push it with "
            "python -m adni_ldm.hub push, then give --model ME/MODEL"
        )
    with tempfile.TemporaryDirectory(prefix="adni_ldm_space_") as folder:
        write_space(Path(folder), app, model)
        check_leaks(Path(folder), index_training_data([], 1), repo_id, model)  # it has no images
        return upload_folder(Path(folder), repo_id, "space", public)


def write_space(folder: Path, app: Path, model: str) -> None:
    """Write app.py, app.yaml with the name of the model, the package, requirements.txt and README.md."""
    shutil.copyfile(app, folder / "app.py")
    (folder / "app.yaml").write_text(yaml.safe_dump({"model": model}))
    package = Path(adni_ldm.__file__).parent
    for path in package.rglob("*"):
        if path.suffix in PACKAGE and path.is_file() and not path.is_symlink():
            target = folder / path.relative_to(package.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    (folder / "requirements.txt").write_text("\n".join(list_requirements()) + "\n")
    (folder / "README.md").write_text(CARD.format(gradio=gradio.__version__, model=model))


def list_requirements() -> list[str]:
    """What the package needs, in the installed versions; gradio is installed according to `sdk_version`."""
    wanted = [Requirement(line) for line in requires("adni-ldm") or ()]
    needed = [entry.name for entry in wanted if not entry.marker]
    return [f"{name}=={version(name).partition('+')[0]}" for name in needed]
