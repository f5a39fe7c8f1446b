"""The machine: torch and torchvision belong together, and the launch files start the processes they name."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adni_ldm.environment import TESTED_PAIR, processes_without_gpu

ROOT = Path(__file__).parents[1]
CHECK = "from adni_ldm.environment import check_torch_pair; check_torch_pair()"


def run_python(code, *path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_torchvision_of_another_torch_is_reported_in_one_line(tmp_path):
    """For a CPU-only torch and the usual torchvision: both versions, and the command that fixes it."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms\\ndoes not exist")'
    )
    result = run_python(CHECK, tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"torch {version('torch')} and torchvision {version('torchvision')}" in line
    assert "operator torchvision::nms does not exist" in line
    assert line.endswith("pip install --force-reinstall torch=={} torchvision=={}".format(*TESTED_PAIR))


def test_pair_that_works_is_let_through():
    """The check is silent here, and costs no import but torchvision's."""
    others = "{'diffusers', 'transformers', 'accelerate', 'datasets'}"
    result = run_python(f"{CHECK}; import sys; assert not {others} & set(sys.modules)")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def pins(name):
    """{canonical name: specifier} of a file of constraints on this Python."""
    lines = (ROOT / name).read_text().splitlines()
    entries = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin.specifier for pin in entries if applies(pin)}


def applies(requirement, extras=("",)):
    return requirement.marker is None or any(
        requirement.marker.evaluate({"extra": extra}) for extra in extras
    )


def test_tested_pair_is_that_of_the_constraints():
    here = pins("constraints.txt")
    assert (str(here["torch"]), str(here["torchvision"])) == tuple(f"=={release}" for release in TESTED_PAIR)


def test_every_requirement_has_an_exact_version():
    """Of what `make .venv` installs, direct and transitive: a missing pin lets the environment drift."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(line) for group in (project["dependencies"], *extras.values()) for line in group]
    waiting = [entry for entry in waiting if entry.name not in ("adni-ldm", "xformers")]
    found = {}
    while waiting:
        entry = waiting.pop()
        name, wanted = canonicalize_name(entry.name), {"", *entry.extras}
        if wanted <= found.get(name, set()):
            continue
        found[name] = wanted | found.get(name, set())
        requires = map(Requirement, distribution(name).requires or [])
        waiting += [requirement for requirement in requires if applies(requirement, found[name])]
    assert not set(found) - set(pins("constraints.txt"))


def test_pair_for_xformers_meets_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["xformers"]
    bounds = {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}
    second = pins("constraints-xformers.txt")
    assert {"torch", "torchvision", "xformers"} <= set(second)
    for name in set(second) & set(bounds):
        (pin,) = second[name]
        assert pin.operator == "==" and pin.version in bounds[name], name


def processes_started(config_file, monkeypatch):
    """How many processes `accelerate launch --config_file` asks torchrun for, and their environment."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    args = launch_command_parser().parse_args(["--config_file", str(ROOT / config_file), "train_ldm.py"])
    args, _, _ = _validate_launch_command(args)
    env = prepare_multi_gpu_env(args)
    return torch.distributed.run.determine_local_world_size(args.nproc_per_node), env


@pytest.mark.parametrize("gpus", [1, 4])
def test_default_launch_takes_all_gpus(gpus, monkeypatch):
    """One process a GPU, also where there is exactly one, in fp16."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    count, env = processes_started("accelerate_config.yaml", monkeypatch)
    assert count == gpus
    assert env["ACCELERATE_MIXED_PRECISION"] == "fp16"


def test_cpu_launch_averages_over_two_processes(tmp_path):
    """The two processes of cpu.yaml know of each other: their sum of ones is 2."""
    script = tmp_path / "sum.py"
    script.write_text(
        "import torch\n"
        "from accelerate import Accelerator\n"
        "from adni_ldm.environment import processes_without_gpu\n"
        "accelerator = Accelerator(cpu=processes_without_gpu())\n"
        "total = accelerator.reduce(torch.ones(1), 'sum').item()\n"
        "print(f'{accelerator.device.type} {accelerator.num_processes} {total}\\n', end='', flush=True)\n"
        "accelerator.end_training()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    result = subprocess.run(
        [*command, "--config_file", str(ROOT / "configs/accelerate/cpu.yaml"), str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["cpu 2 2.0"] * 2


@pytest.mark.parametrize(
    ("world_size", "gpu", "expected"), [("1", False, False), ("2", False, True), ("2", True, False)]
)
def test_several_processes_without_gpu(world_size, gpu, expected, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert processes_without_gpu() is expected
