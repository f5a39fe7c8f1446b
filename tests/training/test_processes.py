"""Two processes of batch b take the step of one of 2b, and agree on every update. Gradients are compared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
import ranks  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "configs/accelerate/cpu.yaml", "tests/training/ranks.py", folder, "no"]
    environment = {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=__import__("os").environ | environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture
def one_process():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(True)


def gradients_of_one(accelerator, which, **options):
    if which == "gan":
        return ranks.opposed(accelerator, 1)
    return ranks.gradients(accelerator, which, 1, **options)


@pytest.mark.parametrize("which", ["vae", "gan", "ldm"])
def test_averaged_gradients_are_those_of_the_whole_batch(which, two_processes, one_process):
    """Two processes of two accumulated batches of 2 against one batch of 8, weight by weight."""
    averaged = load_file(two_processes / "gradients.safetensors")
    whole = gradients_of_one(one_process, which)
    assert whole.keys() <= averaged.keys()
    assert which != "gan" or whole["gan.d_weight"] > 0
    for name, gradient in whole.items():
        scale = gradient.abs().max().clamp(min=1e-5)  # a bias before a norm has a gradient of rounding alone
        assert ((averaged[name] - gradient).abs().max() / scale).item() < 1e-3, name


def test_the_rows_of_a_process_alone_give_other_gradients(one_process):
    """What the test above would see if gradients were not averaged."""
    whole = gradients_of_one(one_process, "ldm")
    model = ranks.build("ldm")
    ranks.loss_of("ldm", model, slice(0, 4)).backward()
    name = "class_embedding.table.weight"
    difference = (dict(model.named_parameters())[name].grad - whole[f"ldm.{name}"]).abs().max()
    assert difference > 0.1 * whole[f"ldm.{name}"].abs().max()


def test_latents_encoded_by_two_processes_are_those_of_one(two_processes, one_process, tmp_path):
    """Bit for bit: in order, each once, whichever process encoded it."""
    ranks.cached(one_process, tmp_path)
    (one,), (two,) = (
        list(folder.glob("*/posteriors.npy")) for folder in (tmp_path, two_processes / "latents")
    )
    assert one.read_bytes() == two.read_bytes() and one.parent.name == two.parent.name


def test_processes_agree_on_what_only_one_of_them_met(two_processes):
    first, second = json.loads((two_processes / "agreed.json").read_text())
    assert first == second
    assert first["decisions"] == [True, False, False, False, False, True, True, False]
    assert first["skipped"] == 2
    assert first["stop"] == 15


@pytest.mark.parametrize("which", ["vae", "ldm"])
def test_bf16_computes_in_half_and_trains_in_float32(which):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        seen = set()
        model = accelerator.prepare(ranks.build(which))
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
        loss = ranks.loss_of(which, model, slice(0, 8))
        accelerator.backward(loss)
        assert seen == {torch.bfloat16}, "the networks compute in bf16"
        assert loss.dtype == torch.float32
        for parameter in model.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
    finally:
        AcceleratorState._reset_state(True)


def test_fp16_decodes_in_float32():
    model = ranks.build("vae")
    model.decode_in_float32 = True
    dtypes = {"encoder": set(), "decoder": set()}
    for part, seen in dtypes.items():
        for module in getattr(model.vae, part).modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _m, _i, output, seen=seen: seen.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float16 convolutions need a GPU
        model(torch.zeros(1, 1, 16, 16), torch.zeros(1, 4, 8, 8))
    assert dtypes == {"encoder": {torch.bfloat16}, "decoder": {torch.float32}}
