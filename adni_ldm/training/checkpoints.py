"""Checkpoints: all that the next update depends on, on disk whole or not at all.

    checkpoints/step-00001000/
        progress.json           step, identity of the run, and the SHA-256 of every other file; written last
        model.safetensors       weights
        ema.safetensors         their EMA, if there is one
        optimizer.bin, random_states_0.pkl, scaler.pt      accelerate's; torch reads them with weights_only

The folder is written under a temporary name, flushed to the disk and renamed: a kill or a power cut at any
moment leaves the last one whole. Under FSDP the weights are accelerate's pytorch_model_fsdp.bin, read with
weights_only as well, and each process has an EMA file; DeepSpeed's files are read by DeepSpeed itself.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adni_ldm.errors import UserError, is_disk_error
from adni_ldm.files import commit_folder, find_damage, remove_leftovers
from adni_ldm.training.launch import on_main_process
from adni_ldm.training.run_record import list_differences

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
Identity = Mapping[str, Mapping[str, object]]


def check_earlier_run(output_dir: str | Path, resume_from: str | None) -> None:
    """Check that the folder holds no checkpoints that a later resume would mistake for this run's.

    Raises UserError if it holds some and the run does not resume, or resumes from an earlier one.
    """
    found = _checkpoints(Path(output_dir) / "checkpoints")
    if not found or resume_from == "latest":
        return
    if resume_from is None:
        raise UserError(
            f"{found[-1]} is of an earlier run: resume it with --resume_from_checkpoint latest, "
            f"remove {found[-1].parent}, or choose another --output_dir"
        )
    start = Path(resume_from)
    if re.fullmatch(r"step-\d+", start.name) and found[-1].name > start.name:
        raise UserError(
            f"{found[-1]} is later than {start}, and `latest` would resume from it: remove it, "
            "or choose another --output_dir"
        )


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, keep: int, **state) -> None:
    """Write `output_dir/checkpoints/step-00001000`, remove all but the newest `keep`. Every process calls it.

    `state` is that of `write_state`. Raises UserError if it cannot be written; the earlier ones stay.
    """
    folder = Path(output_dir) / "checkpoints"
    if accelerator.is_main_process:
        remove_leftovers(folder)
    accelerator.wait_for_everyone()
    write_state(accelerator, folder / f"step-{step:08d}", step, **state)
    if accelerator.is_main_process:
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def write_state(
    accelerator: Accelerator,
    target: Path,
    step: int,
    identity: Identity | None = None,
    ema: EMAModel | None = None,
    **counts: int,
) -> None:
    """Write the state of the run as the folder `target`, atomically. Every process calls it.

    A resume is compared with `identity`, of `run_record.run_identity`; `load_checkpoint` returns `counts`.
    Raises UserError if it cannot be written, as on a full disk.
    """
    partial = target.with_name(f"{target.name}.partial")
    problem = None
    try:
        accelerator.save_state(str(partial))
        _save_ema(accelerator, partial, ema)
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = error
    problems = _gathered(problem)
    if not problems and accelerator.is_main_process:
        progress = {"step": step, **counts, "identity": identity or {}}
        try:
            commit_folder(partial, target, PROGRESS, progress)
        except OSError as error:
            problem = error
    if problems := problems or _gathered(problem):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        if problem and not is_disk_error(problem):
            raise problem
        last = _checkpoints(target.parent)
        raise UserError(
            f"{target} could not be written ({problems[0]}); "
            + (f"the last good checkpoint is {last[-1].name}: " if last else "there is no earlier one: ")
            + "free some space and start again with --resume_from_checkpoint latest"
        ) from problem


def load_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    resume_from: str | None,
    identity: Identity | None = None,
    ema: EMAModel | None = None,
) -> dict[str, int]:
    """Load a checkpoint into what was prepared and into `ema`. Every process calls it.

    The main process verifies the files' SHA-256. With "latest", a damaged checkpoint is renamed to
    `….damaged`, with a warning, and the one before it is loaded. A difference in `identity["must"]` is an
    error, one in `identity["should"]` a warning.

    Returns the step, 0 if nothing was loaded (`resume_from` is None, or "latest" and there is none), and the
    `counts` that it was saved with. Raises UserError if the folder is no checkpoint, all are damaged, or it
    belongs to another run.
    """
    if resume_from is None:
        return {"step": 0}
    folder = Path(output_dir) / "checkpoints"
    path = on_main_process(accelerator, _choose, folder, resume_from, identity or {})
    if path is None:
        return {"step": 0}
    if not all(gather_object([(path / PROGRESS).is_file()])):
        raise UserError(f"{path}: some process cannot see it; --output_dir must be on a disk that they share")
    accelerator.load_state(str(path))
    _load_ema(accelerator, path, ema)
    progress = json.loads((path / PROGRESS).read_text())
    return {name: value for name, value in progress.items() if isinstance(value, int)}


def _choose(folder: Path, resume_from: str, identity: Identity) -> Path | None:
    """The checkpoint to load, intact and of this run; None if there is none yet."""
    if resume_from != "latest":
        path = Path(resume_from)
        if not (path / PROGRESS).is_file():
            raise UserError(
                f"--resume_from_checkpoint {path}: no checkpoint there; give its folder, or latest"
            )
        if damage := find_damage(path, PROGRESS):
            raise UserError(f"--resume_from_checkpoint {path} is damaged: {damage}; give another, or latest")
        _check_identity(path, identity)
        return path
    damages = []
    for path in reversed(_checkpoints(folder)):
        damage = find_damage(path, PROGRESS)
        if not damage:
            _check_identity(path, identity)
            return path
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        logger.warning("checkpoint %s is damaged (%s): skipped, kept as %s", path, damage, aside.name)
        damages.append(f"{aside.name}: {damage}")
    if damages:
        raise UserError(
            f"no intact checkpoint is left in {folder} ({'; '.join(damages)}): "
            "start again without them, or with another --output_dir"
        )
    return None


def _check_identity(path: Path, identity: Identity) -> None:
    """Check that a checkpoint belongs to this run; warn of what may change the rounding."""
    saved = json.loads((path / PROGRESS).read_text())["identity"]
    if differences := list_differences(saved.get("must", {}), identity.get("must", {})):
        raise UserError(
            f"{path} is of another run: {'; '.join(differences)}. Use the settings it was started with, "
            "or another --output_dir"
        )
    if differences := list_differences(saved.get("should", {}), identity.get("should", {})):
        logger.warning(
            "%s: %s. The run continues, and may not repeat the uninterrupted one bit for bit",
            path,
            "; ".join(differences),
        )


def _ema_file(accelerator: Accelerator, folder: Path) -> Path:
    if accelerator.distributed_type == DistributedType.FSDP:  # each process has its shard
        return folder / f"ema_{accelerator.process_index}.safetensors"
    return folder / "ema.safetensors"


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor on this process: all of it, except under FSDP."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _save_ema(accelerator: Accelerator, folder: Path, ema: EMAModel | None) -> None:
    path = _ema_file(accelerator, folder)
    if ema is None or not (accelerator.is_main_process or "_" in path.stem):
        return
    tensors = {
        f"{index:05d}": _local(tensor).detach().cpu().contiguous()
        for index, tensor in enumerate(ema.shadow_params)
    }
    save_file(tensors, path, metadata={"optimization_step": str(ema.optimization_step)})


def _load_ema(accelerator: Accelerator, folder: Path, ema: EMAModel | None) -> None:
    if ema is None:
        return
    with safe_open(_ema_file(accelerator, folder), "pt") as file:
        ema.optimization_step = int(file.metadata()["optimization_step"])
        for index, tensor in enumerate(ema.shadow_params):
            _local(tensor).copy_(file.get_tensor(f"{index:05d}"))


def _gathered(problem: Exception | None) -> list[str]:
    """The problems of all processes, a line each; every process gets the same list."""
    line = None
    if problem is not None:
        line = " ".join((getattr(problem, "strerror", None) or str(problem)).split())[:200]
    return [line for line in gather_object([line]) if line is not None]


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints under their final names, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-{'[0-9]' * 8}/{PROGRESS}"))
