"""Each launch file started once where a CPU can; several processes and machines end as they should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from run_faults import write_slices  # noqa: E402
from tiny_runs import ROOT, WEIGHTS, arguments, weights_of  # noqa: E402

from adni_ldm.errors import UserError  # noqa: E402
from adni_ldm.training.launch import start_accelerator  # noqa: E402
from adni_ldm.training.optimizer import learning_rate_at  # noqa: E402

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
CPU = [*LAUNCH, "configs/accelerate/cpu.yaml"]


def run(*words, status=0, **environment):
    """Output of a command, which must end with `status`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    result = subprocess.run(
        list(map(str, words)), cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    return write_slices(tmp_path_factory.mktemp("data") / "slices")


@pytest.fixture(scope="module")
def on_one_host(slices, tmp_path_factory):
    """A VAE of two processes of one machine, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("one") / "vae"
    run(*CPU, "train_vae.py", *vae_words(slices, folder, checkpointing_steps=4))
    return folder


def vae_words(slices, folder, **settings):
    settings = {"max_steps": 6, "checkpointing_steps": 0} | settings
    return arguments("train_vae", data_dir=slices, output_dir=folder, **settings)


def nearly_alike(one: Path, other: Path) -> bool:
    one, other = (load_file(folder / WEIGHTS["train_vae"]) for folder in (one, other))
    return all(torch.allclose(one[name], other[name], atol=5e-3) for name in one)


def test_the_schedule_counts_updates_and_not_batches_or_processes(on_one_host):
    """Two processes, two accumulated batches an update: still one step of the schedule an update."""
    table = pd.read_csv(on_one_host / "metrics.csv").dropna(subset=["loss"])
    assert table.step.tolist() == [1, 2, 3, 4, 5, 6]
    expected = [learning_rate_at(step, 1e-3, 1, 6) for step in range(6)]
    assert table.learning_rate.tolist() == pytest.approx(expected)


def test_the_run_folder_says_what_the_run_was(on_one_host):
    (start,) = json.loads((on_one_host / "run.json").read_text())["starts"]
    assert start["must"]["number of processes"] == 2 and len(start["must"]["data"]) == 16
    assert start["versions"]["torch"] == torch.__version__.split("+")[0]
    assert start["command"][0] == "train_vae.py" and start["step"] == 0
    if (ROOT / ".git").exists():
        assert len(start["git"].split("+")[0]) == 40
    for name in ("training_config.json", "metrics.csv", "loss.png"):
        assert (on_one_host / name).is_file()


def test_a_resume_with_another_number_of_processes_is_refused(slices, on_one_host):
    said = run(sys.executable, "train_vae.py", *vae_words(slices, on_one_host, batch_size=3), status=1)
    last = said.strip().splitlines()[-1]
    assert "--batch_size was 2, is 3; distribution was MULTI_CPU, is NO; number of processes was 2" in last


def test_bf16_by_its_launch_file(slices, on_one_host, tmp_path):
    words = vae_words(slices, tmp_path)
    place = words.index("--mixed_precision")
    del words[place : place + 2]  # set by the launch file
    said = run(*LAUNCH, "configs/accelerate/bf16.yaml", "--num_processes", 2, "train_vae.py", *words)
    assert "2 processes on cpu, bf16" in said
    assert load_file(tmp_path / WEIGHTS["train_vae"])["encoder.conv_in.weight"].dtype == torch.float32
    assert pd.read_csv(tmp_path / "metrics.csv").loss.notna().any()


def test_fsdp_ends_as_two_whole_copies_do(slices, on_one_host, tmp_path):
    """Our part of it on CPU: gathered for validation and saving, EMA by shards, resumed bit for bit."""
    script = [*LAUNCH, "configs/accelerate/fsdp.yaml", "--mixed_precision", "no"]
    words = vae_words(slices, tmp_path / "vae", checkpointing_steps=4)
    run(*script, "tests/faults/fsdp_on_cpu.py", "train_vae", *words)
    assert nearly_alike(on_one_host, tmp_path / "vae")
    whole = weights_of("train_vae", tmp_path / "vae")
    assert (tmp_path / "vae/checkpoints/step-00000004/ema_1.safetensors").is_file(), "it was sharded"
    shutil.rmtree(tmp_path / "vae/checkpoints/step-00000006")
    (tmp_path / "vae/config.json").unlink()  # as if it had been killed before its last step
    run(*script, "tests/faults/fsdp_on_cpu.py", "train_vae", *words)
    assert json.loads((tmp_path / "vae/run.json").read_text())["starts"][-1]["step"] == 4
    assert weights_of("train_vae", tmp_path / "vae") == whole


def test_a_slice_that_is_not_a_number_is_skipped_by_all_processes(slices, tmp_path):
    """One rank meets it, once an epoch of three updates: both skip, and end with finite weights."""
    words = vae_words(slices, tmp_path / "vae")
    run(*CPU, "tests/faults/poisoned.py", "train_vae", *words)
    table = pd.read_csv(tmp_path / "vae/metrics.csv").dropna(subset=["loss"])
    assert table.skipped.iloc[-1] == 2
    assert all(
        weight.isfinite().all() for weight in load_file(tmp_path / "vae" / WEIGHTS["train_vae"]).values()
    )


def test_a_loss_that_stays_not_finite_ends_the_run(slices, tmp_path):
    words = vae_words(slices, tmp_path / "vae", learning_rate=1e30, max_steps=50, max_nonfinite=3)
    said = run(sys.executable, "train_vae.py", *words, status=1)
    last = said.strip().splitlines()[-1]
    assert last.startswith("train_vae.py: error: loss or gradient not finite in 3 updates in a row")
    assert "Traceback" not in said
    diagnostic = tmp_path / "vae/nonfinite"
    report = json.loads((diagnostic / "report.json").read_text())
    assert report["skipped_in_a_row"] == 3 and len(report["batches"][0]) == 2
    assert (diagnostic / "model.safetensors").is_file() and (diagnostic / "progress.json").is_file()


@pytest.fixture
def two_namespaces():
    """Two hosts of one machine: network namespaces with a cable between them."""

    def ip(*words):
        return subprocess.run(["ip", *words], capture_output=True, text=True)

    names = [f"adni{os.getpid()}{side}" for side in "ab"]
    try:
        made = [ip("netns", "add", name) for name in names]
    except FileNotFoundError:
        pytest.skip("iproute2 is not installed")
    try:
        if any(result.returncode for result in made):
            pytest.skip(f"no network namespace may be made here: {made[0].stderr.strip()}")
        cable = ["link", "add", "wire", "netns", names[0], "type", "veth"]
        result = ip(*cable, "peer", "name", "wire", "netns", names[1])
        if result.returncode:
            pytest.skip(f"no veth pair may be made here: {result.stderr.strip()}")
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.99.0.{number}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


def start_two_machines(prefixes, address, slices, folder, port, **environment):
    """`accelerate launch --num_machines 2` on each; returns their output."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate/multi_node.yaml", "--num_machines", "2"]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_ip", address]
    command += ["--main_process_port", str(port)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    processes = [
        subprocess.Popen(
            [*prefix, *command, "--machine_rank", str(rank), "train_vae.py", *vae_words(slices, folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank, prefix in enumerate(prefixes)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


def test_two_hosts_end_as_two_processes_of_one(two_namespaces, slices, on_one_host, tmp_path):
    prefixes = [["ip", "netns", "exec", name] for name in two_namespaces]
    start_two_machines(prefixes, "10.99.0.1", slices, tmp_path, 29510, GLOO_SOCKET_IFNAME="wire")
    assert weights_of("train_vae", tmp_path) == weights_of("train_vae", on_one_host)


def test_fsdp_without_a_gpu_is_refused(tmp_path, monkeypatch):
    """accelerate would train whole copies without a message."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    AcceleratorState._reset_state(True)
    with pytest.raises(UserError, match="FSDP needs GPUs"):
        start_accelerator(tmp_path, "no", 1, "none", seed=0)
    AcceleratorState._reset_state(True)


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("ip") is not None, reason="two network namespaces show more"
)
def test_two_machines_on_loopback(slices, on_one_host, tmp_path):
    port = 20000 + os.getpid() % 9000
    start_two_machines([[], []], "127.0.0.1", slices, tmp_path, port)
    assert weights_of("train_vae", tmp_path) == weights_of("train_vae", on_one_host)
