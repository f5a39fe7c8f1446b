"""Muon: which parameters it updates, by what, and what a checkpoint keeps."""

import copy

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.training.optimizer import Muon, build_optimizer, check_optimizer, orthogonalize

OPTIONS = {"learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.99)}


@pytest.mark.parametrize("shape", [(16, 144), (144, 16), (16, 24)])
def test_singular_values_become_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(2, *shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.mT @ orthogonalize(matrix) @ right.mT
    values = found.diagonal(dim1=1, dim2=2)
    assert (values - 1).abs().max() < 0.35
    assert (found - torch.diag_embed(values)).abs().max() < 1e-3


def test_a_matrix_is_updated_as_by_torch_muon():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.eye(16, 64)) for _ in range(2))
    mine = build_optimizer("muon", [ours], **OPTIONS)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(16, 64)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    start = torch.eye(16, 64)
    assert torch.allclose(ours - start, theirs - start, atol=2e-3)  # torch computes in bfloat16
    assert (ours - start).abs().max() > 0.01


def test_kernels_are_muons_and_the_rest_is_adamws():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 16, 3), nn.Linear(16, 3))
    network.append(nn.Embedding(3, 32))
    twin = copy.deepcopy(network)
    for one, other in zip(network.parameters(), twin.parameters()):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    before = network[2].weight.detach().clone()
    build_optimizer("muon", network.parameters(), **OPTIONS).step()
    build_optimizer("adamw", twin.parameters(), **OPTIONS).step()
    same = {
        name: torch.allclose(parameter.detach(), dict(twin.named_parameters())[name], atol=1e-7)
        for name, parameter in network.named_parameters()
    }
    assert [name for name, value in same.items() if not value] == ["2.weight"]
    change = network[2].weight.detach() - before * (1 - 0.01 * 0.1)
    assert change.square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.3)  # as AdamW's would be


def test_momentum_is_part_of_a_checkpoint():
    torch.manual_seed(0)
    gradients = torch.randn(4, 16, 32)

    def steps(parameter: nn.Parameter, optimizer: Muon, some: torch.Tensor) -> None:
        for gradient in some:
            parameter.grad = gradient.clone()
            optimizer.step()

    whole, first, second = (nn.Parameter(torch.zeros(16, 32)) for _ in range(3))
    steps(whole, Muon([whole]), gradients)
    optimizer = Muon([first])
    steps(first, optimizer, gradients[:2])
    second.data.copy_(first.data)
    resumed = Muon([second])
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, gradients[2:])
    assert torch.equal(whole, second)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_matrices_are_refused(kind):
    with pytest.raises(UserError, match="muon needs whole matrices"):
        check_optimizer("muon", kind)
    check_optimizer("adamw", kind)
