"""Start of a training run: processes, precision, tracker, and the training data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from torch.distributed import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from adni_ldm.data.folder import SUBJECTS_UNKNOWN
from adni_ldm.data.provenance import DataRecord, describe_data
from adni_ldm.data.slices import CLASS_NAMES, SliceTensors, open_folder, read_slices, to_arrays
from adni_ldm.environment import processes_without_gpu
from adni_ldm.errors import UserError
from adni_ldm.precision import choose_precision
from adni_ldm.training.compute import compute_deterministically


def start_accelerator(
    output_dir: str | Path,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    report_to: str,
    seed: int,
    batch_size: int = 1,
    deterministic: bool = False,
) -> Accelerator:
    """Accelerator with its tracker, and the seed set: weights start alike on every process.

    Args:
        batch_size: of a process; DeepSpeed asks for it.
        deterministic: only kernels that give the same bits each time.

    Raises:
        UserError: fp16 without a GPU, or a tracker that is not installed.
    """
    precision = choose_precision(mixed_precision)
    if deterministic:
        compute_deterministically()
    # refused before anything is written
    if Path(output_dir).is_file():
        raise UserError(f"--output_dir {output_dir}: a file stands there; give a folder")
    try:
        accelerator = Accelerator(
            cpu=processes_without_gpu(),
            mixed_precision=precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            log_with=None if report_to == "none" else report_to,
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
            # The main process decodes data and draws samples while the others wait for it.
            kwargs_handlers=[InitProcessGroupKwargs(init_method="attempt://", timeout=timedelta(hours=2))],
        )
    except ValueError as error:
        if "fp16" in str(error) or "log_with" in str(error) or report_to in str(error):
            raise UserError(str(error)) from error
        raise
    for feature, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(feature) == "true" and accelerator.device.type == "cpu":
            raise UserError(f"{name} needs GPUs here and none is visible; take configs/accelerate/cpu.yaml")
    if plugin := accelerator.state.deepspeed_plugin:  # it cannot ask a DataLoader: none is prepared
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP of version 1 is not supported: set fsdp_version: 2 (configs/accelerate/fsdp.yaml)"
        )
    set_seed(seed)
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def _meet_by_attempt(_url: str, **options) -> Iterator[tuple[Store, int, int]]:
    """How processes find each other: as torch does from the environment, apart for each restart.

    A launcher with --max_restarts keeps its store when it starts the processes again. Under one prefix they
    may find the addresses of those that died and connect to nobody (torch 2.15, static rendezvous).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for store, rank, world_size in rendezvous("env://", timeout=options["timeout"]):
        yield PrefixStore(f"attempt_{attempt}", store), rank, world_size


if distributed.is_available():
    distributed.register_rendezvous_handler("attempt", _meet_by_attempt)


def load_training_slices(
    accelerator: Accelerator,
    data_dir: str | Path,
    image_size: int,
    val_fraction: float,
    class_names: Sequence[str] = CLASS_NAMES,
    table: str | Path | None = None,
) -> tuple[SliceTensors, SliceTensors, DataRecord]:
    """Training and held-out slices, and what they are; decoded once, by the main process.

    Raises:
        UserError: data that cannot be trained on.
    """
    with accelerator.main_process_first():
        scan = open_folder(data_dir, class_names, table)
        splits = read_slices(scan, val_fraction)
        train, val = (SliceTensors(to_arrays(splits[split], image_size)) for split in ("train", "val"))
    data = describe_data(scan, splits)
    if not data.subjects_known:
        accelerator.print(f"note: {SUBJECTS_UNKNOWN}")
    return train, val, data


def describe(accelerator: Accelerator) -> str:
    """What the run computes on, in words."""
    count = accelerator.num_processes
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return f"{count} process{'es' if count > 1 else ''} on {accelerator.device.type}, {precision}"


def on_gpu(accelerator: Accelerator) -> bool:
    """Whether the run computes on an accelerator of any make."""
    return accelerator.device.type != "cpu"
