"""A model pushed to the Hub and loaded again, with the real client, in new processes with empty caches.

The Hub is tests/hub/hub_server.py on loopback, which serves LFS and not Xet: hence HF_HUB_DISABLE_XET=1.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hub_server import TOKEN, HubServer, Repo
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from tiny_stable_diffusion import write_single_file, write_stable_diffusion

from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.hub.push import check_push
from adni_ldm.loading import load_pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


def run(hub, home, *words, status=0, token=TOKEN, cwd=ROOT):
    """Run a new process that is given the address of the Hub only; returns its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def pushed(hub, trained, tmp_path_factory):
    """Output of the push."""
    return run(
        hub, tmp_path_factory.mktemp("home"), "-m", "adni_ldm.hub", "push", trained, "--repo_id", "me/brains"
    )


PLAIN = """
import sys
sys.modules["adni_ldm"] = None  # as where it is not installed: importing it raises
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("me/brains", trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(5)
options = {"num_inference_steps": 3, "output_type": "pt"}
torch.save(pipeline(["AD", "NC"], generator=generator, **options).images, sys.argv[1])
"""


def test_the_pushed_repository_is_private_and_complete(hub, trained, pushed):
    assert f"pushed to {hub.url}/me/brains" in pushed
    repo = hub.repos["model", "me/brains"]
    assert repo.private
    weights = {path for path in repo.files if path.endswith(".safetensors")}
    assert weights == {f"{p}/diffusion_pytorch_model.safetensors" for p in ("vae", "unet", "class_embedding")}
    code = {"pipeline.py", "class_embedding/class_embedding.py", "vae/slice_autoencoder.py"}
    configs = {f"{p}/config.json" for p in ("vae", "unet", "class_embedding")}
    configs |= {"model_index.json", "scheduler/scheduler_config.json"}
    previews = {f"previews/{name}-{index}.png" for name in ("AD", "NC") for index in range(4)}
    more = {"README.md", "metrics.csv", "loss.png", "metrics.json", ".gitattributes"}
    assert set(repo.files) == weights | code | configs | previews | more, "and nothing else of the run"
    own = {"num_inference_steps": 3, "guidance_scale": 1.5, "eta": 0.5}
    assert own.items() <= json.loads(repo.files["model_index.json"]).items()
    assert "| DDIMScheduler, 3 steps, guidance scale 1.5, η = 0.5 |" in repo.files["README.md"].decode()
    assert (trained / "secret.txt").is_file() and (trained / "samples.png").is_file()
    for key in (b'"ids": "', b'"slices": "'):
        assert not any(key in data and key + b'"' not in data for data in repo.files.values())


def test_plain_diffusers_generates_the_same_images(hub, trained, pushed, tmp_path):
    run(hub, tmp_path / "home", "-c", PLAIN, tmp_path / "images.pt", cwd=tmp_path)
    pipeline = load_pipeline(str(trained))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    own = pipeline(["AD", "NC"], num_inference_steps=3, generator=generator, output_type="pt").images
    assert torch.allclose(torch.load(tmp_path / "images.pt"), own, atol=1e-6)


def test_samples_of_a_model_on_the_hub_are_pushed_and_loaded(hub, trained, phantom_dir, pushed, tmp_path):
    home, samples = tmp_path / "home", tmp_path / "samples"
    options = (
        "--num_images",
        2,
        "--num_inference_steps",
        2,
        "--mixed_precision",
        "no",
        "--output_dir",
        samples,
    )
    run(hub, home, "sample.py", "--model", "me/brains", "--class", "all", *options)
    table = pd.read_csv(samples / "metadata.csv")
    assert set(table.model_hash) == {hash_pipeline(load_pipeline(str(trained)))}

    push = ("-m", "adni_ldm.hub", "push-samples", samples, "--repo_id", "me/slices")
    own = ("--data_dir", phantom_dir, "--report", trained / "report")
    run(hub, home, *push, *own)
    repo = hub.repos["dataset", "me/slices"]
    slices = {f"{name}/00000{index}.png" for name in ("AD", "NC") for index in range(2)}
    more = {"README.md", "metadata.csv", "metrics.json", ".gitattributes"}
    assert repo.private and set(repo.files) == slices | more
    read = (
        "import json; from datasets import load_dataset; s = load_dataset('me/slices', split='train');"
        "s[0]['image'].save('first.png');"
        "json.dump([len(s), s.column_names, s['label'][:]], open('read.json', 'w'))"
    )
    run(hub, tmp_path / "other", "-c", read, cwd=tmp_path)
    count, columns, labels = json.loads((tmp_path / "read.json").read_text())
    assert count == 4 and labels == ["AD", "AD", "NC", "NC"]
    assert set(columns) == {"image", *table.columns} - {"file_name", "model"}
    assert np.array_equal(Image.open(tmp_path / "first.png"), Image.open(samples / "AD/000000.png"))

    # They are a data set like any other, which does not say who is on which slice.
    check = ("prepare_data.py", "check", "me/slices", "--figures", "none")
    assert "or --no_subjects" in run(hub, home, *check, status=1)
    found = run(hub, home, *check, "--no_subjects")
    assert "not who is on them" in found and "\nok\n" in found


def test_a_data_set_of_the_hub_is_trained_on_and_the_model_pushed(hub, phantom_dir, tmp_path):
    """A cohort with subjects and covariates, as a repository has it; the leak scan reads it by its name."""
    files = [path for path in phantom_dir.rglob("*") if path.suffix in (".png", ".csv")]
    content = {str(path.relative_to(phantom_dir)): path.read_bytes() for path in files}
    hub.repos["dataset", "me/cohort"] = Repo(private=True, files=content)
    home, data = tmp_path / "home", ("--data_dir", "me/cohort", "--image_size", 16, "--batch_size", 2)
    quick = ("--max_steps", 1, "--report_to", "none", "--checkpointing_steps", 0, "--mixed_precision", "no")
    run(hub, home, "train_vae.py", *data, *quick, "--widths", 8, 16, "--output_dir", tmp_path / "vae")
    (record,) = json.loads((tmp_path / "vae/config.json").read_text())["_trained_on"]
    assert "subjects" not in record
    unet = ("--unet_widths", 32, 64, "--token_dim", 8, "--layers_per_block", 1, "--validation_steps", 0)
    unet += ("--conditions", "age", "sex", "--vae", tmp_path / "vae", "--output_dir", tmp_path / "ldm")
    push = ("--push_to_hub", "--hub_model_id", "me/cohort-model", "--accept_privacy_risk")
    printed = run(hub, home, "train_ldm.py", *data, *quick, *unet, *push)
    assert f"pushed to {hub.url}/me/cohort-model" in printed
    card = hub.repos["model", "me/cohort-model"].files["README.md"].decode()
    assert "age" in card and "sex" in card


def test_a_data_set_of_the_hub_does_not_read_files_of_this_machine(hub, tmp_path):
    """A path in a row, as text or in an image's own field, is no way to an image of the user."""
    Image.new("L", (4, 4)).save(tmp_path / "private.png")
    private = str(tmp_path / "private.png")
    for name, image in {"text": private, "field": {"bytes": None, "path": private}}.items():
        rows = {"image": [image] * 2, "label": ["AD", "NC"], "subject": ["a", "b"]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
        files = {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()}
        hub.repos["dataset", f"me/{name}"] = Repo(private=True, files=files)
        words = ("prepare_data.py", "check", f"me/{name}", "--figures", "none")
        printed = run(hub, tmp_path / "home", *words, status=1)
        assert f"row 0 names a file of this machine, {private}" in printed


def test_training_ends_with_a_push(hub, trained, phantom_dir, ad_nc_folder, train_part_on, pushed, tmp_path):
    settings = {
        "data_dir": phantom_dir,
        "vae": trained / "vae",
        "output_dir": tmp_path / "ldm",
        "image_size": 32,
    }
    settings |= {
        "max_steps": 1,
        "batch_size": 2,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "token_dim": 16,
    }
    settings |= {"layers_per_block": 1, "mixed_precision": "no", "report_to": "none"}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    to_hub = ("--push_to_hub", "--hub_model_id", "me/trained", "--accept_privacy_risk")
    train = ("train_ldm.py", *words, "--unet_widths", 32, 64, *to_hub)
    printed = run(hub, tmp_path / "home", *train)
    assert f"pushed to {hub.url}/me/trained" in printed
    repo = hub.repos["model", "me/trained"]
    assert repo.private and b"The verdict on privacy is: **inconclusive**" in repo.files["README.md"]
    assert {"model_index.json", "loss.png", "metrics.csv"} <= set(repo.files)

    # What would refuse the push refuses it before training: here data of the autoencoder's history.
    train_part_on(shutil.copytree(trained / "vae", tmp_path / "run/vae").parent, "vae", ad_nc_folder())
    words[words.index("--vae") + 1] = tmp_path / "run/vae"
    words[words.index("--output_dir") + 1] = tmp_path / "second"
    printed = run(hub, tmp_path / "home", "train_ldm.py", *words, "--unet_widths", 32, 64, *to_hub, status=1)
    assert "which is not among them" in printed and "--push_to_hub pushes with the --data_dir of" in printed
    assert "training LDM" not in printed and not (tmp_path / "second/metrics.csv").exists()


def test_what_would_refuse_a_push_is_checked_before_training(hub, trained, phantom_dir, monkeypatch):
    for constant, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url}.items():
        monkeypatch.setattr(constants, constant, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    parts = load_pipeline(str(trained)).components
    check_push("me/new", str(phantom_dir), None, parts)
    with pytest.raises(UserError, match="me/public exists and is public"):
        check_push("me/public", str(phantom_dir), None, parts)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "wrong")
    with pytest.raises(UserError, match="rejects the token"):
        check_push("me/new", str(phantom_dir), None, parts)


@pytest.mark.parametrize(
    ("name", "token", "reason"),
    [
        ("me/nothing", TOKEN, "404"),
        ("me/brains", "hf_" + "wrong", "401"),
        ("me/public", TOKEN, "model_index.json"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(hub, pushed, tmp_path, monkeypatch, name, token, reason):
    for constant, value in {"HF_HUB_OFFLINE": False, "ENDPOINT": hub.url}.items():
        monkeypatch.setattr(constants, constant, value)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=f"{name}: not a pipeline .*{reason}"):
        load_pipeline(name)


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_single_file_takes_its_configuration_from_the_hub_or_its_cache(hub, phantom_dir, tmp_path):
    """A checkpoint of the authors' layout gives the weights and class tokens of the folder that it is of."""
    folder, config = write_stable_diffusion(tmp_path / "sd"), "stable-diffusion-v1-5/stable-diffusion-v1-5"
    hub.repos["model", config] = Repo(private=False, files=files_of(folder))
    words = ("train_ldm.py", "--learning_rate", 0, "--tokens_per_class", 5, "--data_dir", phantom_dir)
    words += ("--image_size", 16, "--batch_size", 4, "--max_steps", 1, "--validation_steps", 0)
    words += ("--checkpointing_steps", 0, "--mixed_precision", "no", "--report_to", "none")
    file = write_single_file(folder, tmp_path / "model.safetensors")
    home = tmp_path / "home"
    run(hub, home, *words, "--init_from", file, "--output_dir", tmp_path / "of-file")
    run(hub, home, *words, "--init_from", folder, "--output_dir", tmp_path / "of-folder")
    for part in ("unet", "vae", "class_embedding"):
        one, other = (
            load_file(tmp_path / out / part / "diffusion_pytorch_model.safetensors")
            for out in ("of-file", "of-folder")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    asked = {request.split()[1] for request in hub.requests if f"/{config}/" in request}
    assert asked and not [path for path in asked if path.endswith((".safetensors", ".bin"))]

    hub.repos.pop(("model", config))  # as where there is no network: the cache is enough
    run(hub, home, *words, "--init_from", file, "--output_dir", tmp_path / "of-cache")
    words += ("--init_from", file, "--output_dir", tmp_path / "nothing")
    printed = run(hub, tmp_path / "empty", *words, status=1)
    assert f"hf download {config} --include" in printed and "Traceback" not in printed


def test_stable_diffusion_is_loaded_from_the_hub_in_its_parts_alone(hub, phantom_dir, tmp_path):
    """At a revision; neither the safety checker nor weights in another format are asked for."""
    folder = write_stable_diffusion(tmp_path / "sd")
    files = files_of(folder)
    more = {
        f"{name}.bin": b"pickle" for name in ("safety_checker/pytorch_model", "unet/diffusion_pytorch_model")
    }
    hub.repos["model", "me/tiny-sd"] = Repo(private=False, files=files | more)
    words = ("train_ldm.py", "--init_from", "me/tiny-sd", "--revision", hub.repos["model", "me/tiny-sd"].sha)
    words += ("--data_dir", phantom_dir, "--image_size", 16, "--batch_size", 4, "--max_steps", 1)
    words += ("--validation_steps", 0, "--checkpointing_steps", 0, "--mixed_precision", "no")
    run(hub, tmp_path / "home", *words, "--report_to", "none", "--output_dir", tmp_path / "out")
    asked = {request.split()[1] for request in hub.requests if "/me/tiny-sd/" in request}
    assert not [path for path in asked if "safety_checker" in path or path.endswith(".bin")]
    base = load_pipeline(str(tmp_path / "out")).unet.config["_base_model"]
    assert base == {"name": f"me/tiny-sd@{words[4]}", "license": "creativeml-openrail-m"}
