"""Start of the processes of a training run: accelerator, precision, tracker, and how processes connect."""

import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from adni_ldm.environment import processes_without_gpu
from adni_ldm.errors import UserError
from adni_ldm.precision import choose_precision
from adni_ldm.training.compute import use_deterministic_algorithms

T = TypeVar("T")


def start_accelerator(
    output_dir: str | Path,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    report_to: str,
    seed: int,
    batch_size: int = 1,
    max_grad_norm: float = 1.0,
    deterministic: bool = False,
) -> Accelerator:
    """Create the accelerator with its tracker, and set the seed: all processes start from the same weights.

    DeepSpeed needs the batch size of a process and the gradients' largest norm. Raises UserError for fp16
    without a GPU, or a tracker that is not installed.
    """
    precision = choose_precision(mixed_precision)
    if deterministic:
        use_deterministic_algorithms()
    if Path(output_dir).is_file():  # refused before anything is written
        raise UserError(f"--output_dir {output_dir}: a file of this name exists; give a folder")
    try:
        accelerator = Accelerator(
            cpu=processes_without_gpu(),
            mixed_precision=precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=None if report_to == "none" else report_to,
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
            # The main process decodes data and evaluates samples while the others wait for it.
            kwargs_handlers=[InitProcessGroupKwargs(init_method="attempt://", timeout=timedelta(hours=2))],
        )
    except ValueError as error:
        if "fp16" in str(error) or "log_with" in str(error) or report_to in str(error):
            raise UserError(str(error)) from error
        raise
    for feature, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(feature) == "true" and accelerator.device.type == "cpu":
            raise UserError(f"{name} needs GPUs and none is visible; use configs/accelerate/cpu.yaml")
    if plugin := accelerator.state.deepspeed_plugin:
        fill_deepspeed_config(plugin.deepspeed_config, batch_size, max_grad_norm)
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP of version 1 is not supported: set fsdp_version: 2 (configs/accelerate/fsdp.yaml)"
        )
    set_seed(seed)
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def fill_deepspeed_config(config: dict, batch_size: int, max_grad_norm: float) -> None:
    """Set what DeepSpeed otherwise guesses, in place: no DataLoader is prepared that it could read the batch
    size from, and its `gradient_clipping: auto` becomes 1.0 whatever --max_grad_norm is."""
    config["train_micro_batch_size_per_gpu"] = batch_size
    config["gradient_clipping"] = max_grad_norm


# Not `rdzv_backend: c10d`, which separates restarts as well: on one machine it listens at a fixed port, where
# two runs of a shared node would meet.
def _connect_by_attempt(_url: str, **options) -> Iterator[tuple[Store, int, int]]:
    """Connect processes as torch does from the environment, with a separate store prefix for each restart.

    A launcher with --max_restarts keeps its store when it restarts the processes. Under one prefix they may
    find the addresses of the processes that died and connect to nobody (torch 2.15, static rendezvous).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, world_size in rendezvous("env://", timeout=options["timeout"]):
        yield PrefixStore(f"attempt_{attempt}", store), rank, world_size


if distributed.is_available():
    distributed.register_rendezvous_handler("attempt", _connect_by_attempt)


def on_main_process(accelerator: Accelerator, function: Callable[..., T], *arguments: object) -> T:
    """Call a function on the main process alone; all processes get its result, or raise its UserError."""
    result = refusal = None
    if accelerator.is_main_process:
        try:
            result = function(*arguments)
        except UserError as error:
            refusal = str(error)
    result, refusal = broadcast_object_list([result, refusal])
    if refusal:
        raise UserError(refusal)
    return result


def describe_compute(accelerator: Accelerator) -> str:
    """The processes, device and precision of a run, for its first message."""
    count = accelerator.num_processes
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}, {precision}"
