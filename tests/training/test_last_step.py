"""The end of a run: its checkpoint, signals and a full disk while the model is saved, and a second start."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_ldm
from adni_ldm.errors import UserError
from adni_ldm.models import build_autoencoder
from adni_ldm.training.run import TrainingRun

SETTINGS = "--image_size 32 --unet_widths 32 64 --token_dim 16 --layers_per_block 1 --batch_size 4"
SETTINGS += " --max_steps 3 --warmup_steps 0 --log_steps 1 --mixed_precision no --report_to none"
SETTINGS += " --validation_steps 0 --checkpointing_steps 2 --ema_halflife_images 8"
LATEST = ("--resume_from_checkpoint", "latest")
LEFT_BY_A_RUN = {"checkpoints", "metrics.csv", "loss.png", "run.json", "training_config.json"}
MODEL = {
    "model_index.json",
    "pipeline.py",
    "vae",
    "unet",
    "class_embedding",
    "scheduler",
}


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
    torch.manual_seed(0)
    vae = build_autoencoder(32, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def train(phantom_dir, vae_dir, monkeypatch, tmp_path):
    def train(name: str, *more) -> Path:
        AcceleratorState._reset_state(True)
        words = ("--data_dir", phantom_dir, "--vae", vae_dir, "--output_dir", tmp_path / name)
        words = ["train_ldm.py", *words, *SETTINGS.split(), *more]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        train_ldm.main()
        return tmp_path / name

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    one, other = weights(one), weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}  # until the process ends


@pytest.fixture
def whole(train):
    return train("whole")


def test_a_finished_run_that_is_started_again_ends_at_once(train, whole, capsys):
    assert names(whole) - {"samples.png"} == LEFT_BY_A_RUN | MODEL
    assert sorted(names(whole / "checkpoints")) == ["step-00000002", "step-00000003"]
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train("whole", *LATEST)
    assert end.value.code == 0 and "already finished" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before

    # With more steps it is another run: the learning rate of every step depends on their number.
    with pytest.raises(
        UserError, match="max_steps was 3, is 5.*--init_from .*whole trains its model further"
    ):
        train("whole", *LATEST, "--max_steps", 5)
    with pytest.raises(UserError, match="is of an earlier run"):
        train("whole")

    # Finished is a run whose model is there.
    (whole / "model_index.json").unlink()
    torch.save(weights(whole), whole.parent / "before")
    train("whole", *LATEST)
    assert json.loads((whole / "run.json").read_text())["starts"][-1]["step"] == 3
    before = torch.load(whole.parent / "before")
    assert all(torch.equal(weights(whole)[name], before[name]) for name in before)


def test_a_finished_run_without_checkpoints_is_recognized(train):
    folder = train("none", "--checkpointing_steps", 0)
    with pytest.raises(SystemExit):
        train("none", "--checkpointing_steps", 0, *LATEST)
    with pytest.raises(UserError, match="holds a finished run of other settings: .*batch_size was 4, is 2"):
        train("none", "--checkpointing_steps", 0, *LATEST, "--batch_size", 2)
    assert (folder / "model_index.json").is_file()


@pytest.mark.parametrize("moment", ["after the last update", "while the model is saved"])
def test_a_signal_at_the_end_loses_no_step(train, whole, monkeypatch, capfd, moment):
    owner, name = {
        "after the last update": (TrainingRun, "apply_ema"),
        "while the model is saved": (train_ldm.ClassConditionalLDMPipeline, "save_pretrained"),
    }[moment]

    def and_signalled(*arguments):
        original(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    original = getattr(owner, name)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(owner, name, and_signalled)
        train("told")
    assert end.value.code == 143 and "SIGTERM: stopped after step 3; its" in capfd.readouterr().out
    told = whole.parent / "told"
    assert names(told) <= LEFT_BY_A_RUN, "no model, and no part of one"
    train("told", *LATEST)
    assert json.loads((told / "run.json").read_text())["starts"][-1]["step"] == 3, "nothing is trained again"
    assert same_weights(told, whole)
    assert (told / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_without_a_checkpoint_a_signal_waits_until_the_model_is_saved(train, whole, monkeypatch):
    def and_signalled(run):
        original(run)
        os.kill(os.getpid(), signal.SIGTERM)

    original = TrainingRun.apply_ema
    monkeypatch.setattr(TrainingRun, "apply_ema", and_signalled)
    assert same_weights(train("told", "--checkpointing_steps", 0), whole)


def test_a_disk_that_is_full_when_the_model_is_saved_is_named_in_one_line(train, whole, monkeypatch):
    """A limit on the size of a file stands for it: the error is that of safetensors, no OSError."""

    def and_limited(run):
        original(run)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    original, limits = TrainingRun.apply_ema, resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(TrainingRun, "apply_ema", and_limited)
        try:
            train("full")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "full could not be written (" in str(error.value) and "latest" in str(error.value)
    assert "\n" not in str(error.value)
    full = whole.parent / "full"
    assert names(full) <= LEFT_BY_A_RUN
    assert same_weights(train("full", *LATEST), whole)


def test_a_second_model_replaces_the_first_as_a_whole(train, whole, monkeypatch):
    """Killed after its first component, the folder would hold a new U-Net beside old class tokens."""
    (whole / "checkpoints").rename(whole.parent / "removed")
    save = train_ldm.ClassConditionalLDMPipeline.save_pretrained

    def killed(pipeline, folder):
        save(pipeline, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_ldm.ClassConditionalLDMPipeline, "save_pretrained", killed)
        train("whole", "--seed", 1)
    train("other", "--seed", 0)
    assert same_weights(whole, whole.parent / "other"), "the earlier model"
