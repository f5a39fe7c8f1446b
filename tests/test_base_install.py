"""The base install: data check, training and sampling run without any of the extras' packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stand_ins import make_pipeline

ROOT = Path(__file__).parents[1]
# Modules of the extras; MONAI is a base dependency, which only the losses that need it import.
EXTRAS = "scipy sklearn threadpoolctl umap nilearn nibabel pydicom SimpleITK monai gradio peft".split()
DISTRIBUTIONS = [{"sklearn": "scikit-learn", "umap": "umap-learn"}.get(name, name.lower()) for name in EXTRAS]
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] not in {EXTRAS}:
            return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        found = super().find_distributions(context)
        return (entry for entry in found if entry.name.lower() not in {DISTRIBUTIONS})

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a sitecustomize.py that hides those packages, and small presets."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    common = {"image_size": 32, "max_steps": 2, "batch_size": 4, "warmup_steps": 1, "log_steps": 1}
    common |= {"mixed_precision": "no", "checkpointing_steps": 0}
    vae = common | {"widths": [16, 32]}
    ldm = common | {"unet_widths": [32, 64], "token_dim": 16, "layers_per_block": 1, "num_inference_steps": 2}
    for name, settings in {"vae": vae, "ldm": ldm}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


def run(work, *arguments, status=0):
    """Run a command without the extras; returns its standard error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (work, ROOT)))}
    command = [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]
    result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stderr


def test_packages_are_hidden(work):
    environment = os.environ | {"PYTHONPATH": str(work)}
    code = (
        "from importlib import metadata, util\n"
        f"assert not any(map(util.find_spec, {EXTRAS}))\n"
        f"assert not {{entry.name.lower() for entry in metadata.distributions()}} & {set(DISTRIBUTIONS)}\n"
        "metadata.version('torch')"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_data_are_checked(work, phantom_dir):
    run(work, "prepare_data.py", "check", phantom_dir)
    assert list((work / "check").glob("*.png"))


def test_recipes_train_and_sample(work, phantom_dir):
    vae, ldm = work / "runs/vae", work / "runs/ldm"
    run(work, "train_vae.py", "--config", "vae.yaml", "--data_dir", phantom_dir, "--output_dir", vae)
    words = ("--config", "ldm.yaml", "--data_dir", phantom_dir, "--vae", vae, "--output_dir", ldm)
    run(work, "train_ldm.py", *words)
    run(work, "sample.py", "--model", ldm, "--num_images", 2, "--num_inference_steps", 2)
    assert len(list((work / "samples").glob("*/*.png"))) == 4


@pytest.mark.parametrize(
    ("extra", "arguments"),
    [
        ("scans", ("prepare_data.py", "phantom", "--output_dir", "data")),
        ("scans", ("prepare_data.py", "scans", "--output_dir", "data")),
        ("eval", ("evaluate.py", "--real", "DATA", "--samples", "samples")),
        ("eval", ("train_ldm.py", "--data_dir", "DATA", "--vae", "VAE", "--evaluation_steps", 1)),
        ("lora", ("train_ldm.py", "--data_dir", "DATA", "--init_from", "MODEL", "--lora_rank", 2)),
        ("app", ("app.py", "--model", "MODEL")),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0]}-{value[-2]}",
)
def test_missing_extra_is_named_in_one_line(work, phantom_dir, extra, arguments):
    model = work / "model"
    make_pipeline(image_size=32).save_pretrained(model)
    places = {"DATA": phantom_dir, "MODEL": model, "VAE": model / "vae"}
    error = run(work, *(places.get(argument, argument) for argument in arguments), status=1)
    last = error.strip().splitlines()[-1]
    assert f"adni-ldm[{extra}]" in last and "Traceback" not in error
