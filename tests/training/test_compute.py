"""Flags for memory and speed change neither the result nor the names of the weights."""

import pytest
import torch

from adni_ldm.errors import UserError
from adni_ldm.models.autoencoder import build_autoencoder
from adni_ldm.models.denoiser import build_denoiser
from adni_ldm.training.compute import check_compute_options, set_compute_options
from adni_ldm.training.ema import HalfLifeEMA, update_ema
from adni_ldm.training.optimizer import build_optimizer, set_learning_rate


@pytest.mark.parametrize(
    "flags", [{"gradient_checkpointing": True}, {"compile": True, "backend": "eager"}, {"on_cpu": True}]
)
def test_kernels_keep_gradients_and_names(flags):
    def gradients(**options):
        torch.manual_seed(0)
        unet = build_denoiser(4, 8, (32, 32), 16, 1)
        set_compute_options(unet, [unet], **options)
        noisy, tokens = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 16)
        unet(noisy, torch.tensor([1, 5]), encoder_hidden_states=tokens).sample.square().mean().backward()
        return {name: parameter.grad for name, parameter in unet.named_parameters()}, unet.state_dict().keys()

    (plain, names), (flagged, flagged_names) = gradients(), gradients(**flags)
    assert names == flagged_names
    assert all(torch.allclose(plain[name], flagged[name], atol=1e-6) for name in plain)


def test_gradient_checkpointing_reaches_both_networks():
    networks = [build_autoencoder(16, widths=(8, 16)), build_denoiser(4, 8, (32, 32), 16, 1)]
    for network in networks:
        set_compute_options(network, [], gradient_checkpointing=True)
    assert all(network.is_gradient_checkpointing for network in networks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize(
    ("flags", "message"),
    [(("xformers", "adamw"), "--attention xformers needs CUDA"), (("sdpa", "adamw8bit"), "needs CUDA")],
)
def test_what_needs_cuda_is_refused_without_it(flags, message):
    check_compute_options("sdpa", "adamw")
    with pytest.raises(UserError, match=message):
        check_compute_options(*flags)


@pytest.mark.parametrize("flags", [("xformers", "adamw"), ("sdpa", "adamw8bit")])
def test_what_is_not_installed_is_refused_with_the_command(flags, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("adni_ldm.training.compute.find_spec", lambda name: None)
    with pytest.raises(UserError, match="is not installed: pip install"):
        check_compute_options(*flags)


def test_an_offloaded_average_is_the_same_average():
    """Weights elsewhere than their average, as under --offload_ema: averaged, and not just copied."""
    weights = [torch.nn.Parameter(torch.zeros(3))]
    ours, plain = HalfLifeEMA(weights, 8, 4, "cpu"), HalfLifeEMA(weights, 8, 4, "cpu")
    for _ in range(4):
        with torch.no_grad():
            weights[0] += 1
        moved = [Elsewhere(weights[0].detach().clone())]
        update_ema(ours, moved)
        plain.step(weights)
    assert torch.allclose(ours.shadow_params[0], plain.shadow_params[0])
    assert 0 < ours.shadow_params[0][0] < 4


class Elsewhere(torch.nn.Parameter):
    """A weight that says it lies on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


def test_optimizer_and_learning_rate():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = build_optimizer("adamw", [weight], 0.1, 0.0, betas=(0.8, 0.9))
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.25 and optimizer.param_groups[0]["betas"] == (0.8, 0.9)
