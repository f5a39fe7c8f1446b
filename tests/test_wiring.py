"""The wiring of the recipes: which settings reach the loss and the optimizer, and which weights are saved.

Each recipe trains once, in this process, for three epochs on the phantom. What its loss received, what its
optimizer received and what it saved is recorded, and compared with the same quantity computed here.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import train_ldm
import train_vae
from adni_ldm.loading import load_pipeline
from adni_ldm.models.autoencoder import build_autoencoder
from adni_ldm.models.denoiser import ConditionalDenoiser

BATCH, EPOCHS = 4, 3
HALFLIFE_IMAGES = 40
CLIPPED = 0.01  # far below the norm of any gradient here
KL_WEIGHT = 0.1
SNR_GAMMA = 0.5  # below 1, so that it weighs most timesteps
DROPOUT = 0.5


@dataclass
class Record:
    """What a training run did: per optimizer update, per batch, and in its folder."""

    folder: Path
    grad_norms: list[float] = field(default_factory=list)  # L2 norm of the gradient, per update
    learning_rates: list[float] = field(default_factory=list)  # per update
    weights: list[torch.Tensor] = field(default_factory=list)  # all of them, before training and per update
    labels: list[torch.Tensor] = field(default_factory=list)  # (B,) per batch
    losses: list[dict] = field(default_factory=list)  # arguments of `diffusion_loss` per batch

    @property
    def metrics(self) -> pd.DataFrame:
        """A row per update, and rows of what was measured in between."""
        return pd.read_csv(self.folder / "metrics.csv")


def train(recipe, folder: Path, *, nan_at: int | None = None, **settings) -> Record:
    """Run the recipe's `main` with these settings in this process.

    Args:
        nan_at: batch whose loss is made not a number.
    """
    record = Record(folder)
    settings |= {"output_dir": folder, "image_size": 32, "batch_size": BATCH, "warmup_steps": 1}
    settings |= {"log_steps": 1, "checkpointing_steps": 0, "mixed_precision": "no", "report_to": "none"}
    words = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]

    def parameters(optimizer):
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def before_update(optimizer, *_):
        if not record.weights:
            record.weights.append(flat(parameters(optimizer)))
        record.learning_rates.append(optimizer.param_groups[0]["lr"])
        gradients = [weight.grad for weight in parameters(optimizer) if weight.grad is not None]
        record.grad_norms.append(flat(gradients).norm().item() if gradients else 0.0)

    def after_update(optimizer, *_):
        record.weights.append(flat(parameters(optimizer)))

    forward, diffusion_loss = ConditionalDenoiser.forward, train_ldm.diffusion_loss
    reconstruction_loss = train_vae.reconstruction_loss
    batches = itertools.count()

    def record_labels(self, noisy, timesteps, labels, conditions=None):
        record.labels.append(labels)
        return forward(self, noisy, timesteps, labels, conditions)

    def record_loss(prediction, clean, noise, timesteps, scheduler, snr_gamma):
        names = ("prediction", "clean", "noise", "timesteps", "scheduler")
        record.losses.append(dict(zip(names, (prediction.detach(), clean, noise, timesteps, scheduler))))
        loss = diffusion_loss(prediction, clean, noise, timesteps, scheduler, snr_gamma)
        return loss * poison()

    def poisoned_loss(*arguments):
        return reconstruction_loss(*arguments) * poison()

    def poison():
        return math.nan if next(batches) == nan_at else 1

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as hooks:
        patch.setattr(sys, "argv", [f"{recipe.__name__}.py", *words])
        patch.setattr(ConditionalDenoiser, "forward", record_labels)
        patch.setattr(train_ldm, "diffusion_loss", record_loss)
        patch.setattr(train_vae, "reconstruction_loss", poisoned_loss)
        hooks.callback(register_optimizer_step_pre_hook(before_update).remove)
        hooks.callback(register_optimizer_step_post_hook(after_update).remove)
        assert not recipe.main()
    AcceleratorState._reset_state(True)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return record


def flat(tensors) -> torch.Tensor:
    """A copy of all values in one vector."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def exponential_average(weights: list[torch.Tensor]) -> torch.Tensor:
    """EMA after the last update; its half-life is at most 8 % of the images seen (Karras et al. 2022)."""
    average = weights[0].clone()
    for update, current in enumerate(weights[1:], start=1):
        halflife = min(HALFLIFE_IMAGES, 0.08 * update * BATCH)
        average.lerp_(current, 1 - 0.5 ** (BATCH / halflife))
    return average


def assert_is_average(saved: torch.Tensor, record: Record) -> None:
    """The saved weights are the EMA up to rounding, and not the last weights."""
    expected, last = exponential_average(record.weights), record.weights[-1]
    assert (saved - expected).norm() < 0.01 * (last - expected).norm()


@pytest.fixture(scope="module")
def epoch_steps(phantom_dir) -> int:
    """Updates of an epoch: batches divide the training set, so that an epoch has each slice once."""
    images = len(list((phantom_dir / "train").rglob("*.png")))
    assert images % BATCH == 0
    return images // BATCH


@pytest.fixture(scope="module")
def shifted_vae(tmp_path_factory) -> Path:
    """An autoencoder whose latents are far from zero mean and unit variance."""
    torch.manual_seed(0)
    vae = build_autoencoder(32, widths=(16, 32))
    with torch.no_grad():
        vae.quant_conv.weight *= 0.1
        vae.quant_conv.bias.copy_(torch.tensor([3.0, -2.0, 1.5, -1.0] + 4 * [-5.0]))  # mean and log-variance
    folder = tmp_path_factory.mktemp("shifted")
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae_settings(phantom_dir, shifted_vae, epoch_steps):
    return {
        "data_dir": phantom_dir,
        "init_from": shifted_vae,
        "max_steps": EPOCHS * epoch_steps,
        "learning_rate": 1e-3,
        "use_ema": True,
        "ema_halflife_images": HALFLIFE_IMAGES,
        "max_grad_norm": CLIPPED,
    }


@pytest.fixture(scope="module")
def vae_run(vae_settings, tmp_path_factory) -> Record:
    return train(train_vae, tmp_path_factory.mktemp("vae"), **vae_settings, kl_weight=KL_WEIGHT)


@pytest.fixture(scope="module")
def ldm_settings(phantom_dir, vae_run, epoch_steps, tmp_path_factory):
    return {
        "data_dir": phantom_dir,
        "vae": vae_run.folder,
        "latent_cache": tmp_path_factory.mktemp("latents"),
        "stable_targets": False,  # so that what the loss gets are the latents
        "max_steps": EPOCHS * epoch_steps,
        "learning_rate": 1e-3,
        "unet_widths": "32 64",
        "token_dim": 16,
        "layers_per_block": 1,
        "validation_steps": 0,
        "use_ema": True,
        "ema_halflife_images": HALFLIFE_IMAGES,
        "max_grad_norm": CLIPPED,
        "label_dropout": DROPOUT,
        "snr_gamma": SNR_GAMMA,
    }


@pytest.fixture(scope="module")
def ldm_run(ldm_settings, tmp_path_factory) -> Record:
    return train(train_ldm, tmp_path_factory.mktemp("ldm"), **ldm_settings)


def test_label_dropout_replaces_labels_by_the_null_class(ldm_run):
    labels = torch.cat(ldm_run.labels)
    dropped = (labels == 2).double().mean().item()  # of AD 0, NC 1 and the null class
    assert abs(dropped - DROPOUT) < 3 * (DROPOUT * (1 - DROPOUT) / len(labels)) ** 0.5  # 3 standard errors
    assert set(labels.tolist()) == {0, 1, 2}


def test_the_denoiser_learns_from_latents_of_zero_mean_and_unit_variance(ldm_run):
    clean = torch.cat([batch["clean"] for batch in ldm_run.losses])  # three epochs, (3 N, C, h, w)
    torch.testing.assert_close(clean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(clean.std(dim=(0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


def test_snr_gamma_weights_the_loss(ldm_run):
    """The loss of each update is that of min-SNR-γ for v-prediction: min(SNR, γ) / (SNR + 1)."""
    weighted, plain = [], []
    for batch in ldm_run.losses:
        alphas = batch["scheduler"].alphas_cumprod[batch["timesteps"]]  # (B,)
        signal_scale, noise_scale = (part.sqrt().view(-1, 1, 1, 1) for part in (alphas, 1 - alphas))
        velocity = signal_scale * batch["noise"] - noise_scale * batch["clean"]
        errors = F.mse_loss(batch["prediction"], velocity, reduction="none").mean(dim=(1, 2, 3))
        snr = alphas / (1 - alphas)
        weighted.append((errors * snr.clamp(max=SNR_GAMMA) / (snr + 1)).mean().item())
        plain.append(errors.mean().item())
    losses = ldm_run.metrics.loss.dropna().tolist()
    assert losses == pytest.approx(weighted, rel=1e-3)
    assert all(unweighted > 2 * loss for unweighted, loss in zip(plain, losses))


def test_the_saved_pipeline_has_the_average_of_the_denoisers_weights(ldm_run):
    pipeline = load_pipeline(str(ldm_run.folder))
    saved = flat([*pipeline.unet.parameters(), *pipeline.class_embedding.parameters()])
    assert_is_average(saved, ldm_run)


def test_the_saved_vae_has_the_average_of_the_weights(vae_run):
    assert_is_average(flat(AutoencoderKL.from_pretrained(vae_run.folder).parameters()), vae_run)


def test_the_noise_schedule_ends_in_pure_noise_and_is_saved(ldm_run):
    """Zero terminal SNR (Lin et al. 2024), v-prediction, and sampling that starts at the last timestep."""
    trained = ldm_run.losses[0]["scheduler"]
    saved = load_pipeline(str(ldm_run.folder)).scheduler
    assert trained.alphas_cumprod[-1] == 0 < trained.alphas_cumprod[-2]
    assert torch.equal(saved.alphas_cumprod, trained.alphas_cumprod)
    assert saved.config.prediction_type == trained.config.prediction_type == "v_prediction"
    saved.set_timesteps(5)
    assert saved.timesteps[0] == len(trained.alphas_cumprod) - 1


@pytest.mark.parametrize("run", ["vae_run", "ldm_run"])
def test_the_learning_rate_falls_to_zero_by_a_half_cosine(run, request):
    """After a warm-up of one update, from the peak of 1e-3."""
    rates = request.getfixturevalue(run).learning_rates
    steps = torch.linspace(0, math.pi, len(rates))[:-1]
    assert rates == pytest.approx([1e-3, *(0.5e-3 * (1 + steps.cos())).tolist()], rel=1e-4)


@pytest.mark.parametrize("run", ["vae_run", "ldm_run"])
def test_max_grad_norm_bounds_each_update(run, request):
    """The norm is the bound itself, since every gradient here is larger."""
    norms = request.getfixturevalue(run).grad_norms
    assert norms == pytest.approx([CLIPPED] * len(norms), rel=1e-3)


def test_kl_weight_regularizes_the_posterior(vae_settings, vae_run, tmp_path):
    """The KL term is in the loss with its weight, and the held-out KL ends lower than without it."""
    table = vae_run.metrics.dropna(subset="loss")
    penalty = KL_WEIGHT * table.kl
    assert table.loss.tolist() == pytest.approx((table.reconstruction_loss + penalty).tolist(), rel=1e-4)
    assert (penalty > 0.1 * table.loss).all()
    without = train(train_vae, tmp_path, **vae_settings, kl_weight=0)
    ends = [run.metrics.val_kl.dropna().iloc[-1] for run in (vae_run, without)]
    assert ends[0] < 0.99 * ends[1]


@pytest.mark.parametrize("recipe", [train_vae, train_ldm], ids=["train_vae", "train_ldm"])
def test_an_update_that_is_not_finite_changes_nothing(recipe, request, tmp_path):
    """All updates but the one whose loss is not a number change the weights, and the log counts it."""
    settings = request.getfixturevalue({train_vae: "vae_settings", train_ldm: "ldm_settings"}[recipe])
    record = train(recipe, tmp_path, nan_at=3, **settings | {"max_steps": 6})
    changes = [not torch.equal(*pair) for pair in itertools.pairwise(record.weights)]
    assert sum(changes) == 5 and record.weights[-1].isfinite().all()
    assert record.metrics.skipped.max() == 1
