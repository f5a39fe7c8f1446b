"""TrainingRun: the decision on an update stays on the device, and what DeepSpeed must be given."""

import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_ldm
from adni_ldm.training.launch import fill_deepspeed_config
from adni_ldm.training.run import TrainingRun

UNET = "unet/diffusion_pytorch_model.safetensors"
SETTINGS = ("--image_size", 32, "--unet_widths", 32, 64, "--token_dim", 16, "--layers_per_block", 1)
SETTINGS += (
    "--batch_size",
    4,
    "--max_steps",
    6,
    "--warmup_steps",
    0,
    "--learning_rate",
    1e-3,
    "--log_steps",
    2,
)
SETTINGS += ("--mixed_precision", "no", "--report_to", "none", "--validation_steps", 0)
SETTINGS += ("--checkpointing_steps", 4, "--ema_halflife_images", 8)


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory):
    from adni_ldm.models import build_autoencoder

    torch.manual_seed(0)
    vae = build_autoencoder(32, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture
def train(phantom_dir, vae_dir, monkeypatch, tmp_path):
    """Train the LDM in this process, its third and last loss not a number; returns folder and run."""
    runs, loss = [], train_ldm.diffusion_loss

    def keep(self, *networks, deferred=False, **options):
        prepare(self, *networks, **options)
        self.deferred = deferred
        runs.append(self)

    def poisoned(*tensors):
        calls.append(None)
        return loss(*tensors) * (torch.nan if len(calls) in (3, 6) else 1)

    prepare, calls = TrainingRun.prepare, []

    def train(name, deferred):
        AcceleratorState._reset_state(True)
        calls.clear()
        monkeypatch.setattr(train_ldm, "diffusion_loss", poisoned)
        monkeypatch.setattr(TrainingRun, "prepare", lambda *a, **k: keep(*a, deferred=deferred, **k))
        folder = tmp_path / name
        words = ("--data_dir", phantom_dir, "--vae", vae_dir, "--output_dir", folder, *SETTINGS)
        monkeypatch.setattr(sys, "argv", ["train_ldm.py", *map(str, words)])
        train_ldm.main()
        return folder, runs[-1]

    yield train
    AcceleratorState._reset_state(True)


def test_a_decision_read_one_update_late_is_the_same_decision(train):
    """As a GPU does it: skipped on the device, counted and averaged one update later, in the same order."""
    (now, first), (late, second) = train("now", False), train("late", True)
    assert first.guard.counts == second.guard.counts == {"skipped": 2, "in_a_row": 1}
    weights, others = load_file(now / UNET), load_file(late / UNET)
    assert all(torch.equal(weights[name], others[name]) for name in weights), "the EMA"
    for parameter, other in zip(first.trained, second.trained, strict=True):
        assert parameter.isfinite().all() and torch.equal(parameter, other)
    for name in ("ema.safetensors", "model.safetensors"):
        saved = [load_file(folder / "checkpoints/step-00000004" / name) for folder in (now, late)]
        assert all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0]), name
    assert (now / "metrics.csv").read_text() == (late / "metrics.csv").read_text()


def test_no_value_of_an_update_is_read_before_the_next_one(train, monkeypatch):
    """A read waits for the GPU. The flags of the update before are the one exception."""
    step, settle, reads = TrainingRun.step, TrainingRun._settle, []
    observed = [False]

    def step_observed(self, *args, **kwargs):
        if self.updates + 1 in (3, 5):  # no row of metrics.csv, no checkpoint
            observed[0] = True
        try:
            step(self, *args, **kwargs)
        finally:
            observed[0] = False

    def settle_unobserved(self):
        was, observed[0] = observed[0], False
        settle(self)
        observed[0] = was

    def recorded(name, read):
        def read_recorded(*args, **kwargs):
            if observed[0]:
                reads.append(name)
            return read(*args, **kwargs)

        return read_recorded

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, recorded(name, getattr(torch.Tensor, name)))
    monkeypatch.setattr(TrainingRun, "step", step_observed)
    monkeypatch.setattr(TrainingRun, "_settle", settle_unobserved)
    train("late", True)
    assert reads == []
    train("now", False)
    assert reads, "what the test would see if flags were read at once"


def test_deepspeed_is_given_what_it_would_guess():
    """Its own `auto` clips at 1.0, and reads the batch size from a DataLoader, of which none is prepared."""
    config = {"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}
    fill_deepspeed_config(config, batch_size=8, max_grad_norm=0.25)
    assert config == {"gradient_clipping": 0.25, "train_micro_batch_size_per_gpu": 8}
