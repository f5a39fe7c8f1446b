"""Checkpoints: everything that the next step depends on, on disk whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from adni_ldm.errors import UserError

logger = logging.getLogger(__name__)


def refuse_earlier_run(output_dir: str | Path, resume_from: str | None) -> None:
    """Refuse to start afresh over the checkpoints of an earlier run: a later resume would take up that one.

    Raises:
        UserError: there are some, and the run does not resume.
    """
    found = _checkpoints(Path(output_dir) / "checkpoints")
    if found and resume_from is None:
        raise UserError(
            f"{found[-1]} is of an earlier run: go on with --resume_from_checkpoint latest, "
            f"remove {found[-1].parent}, or choose another --output_dir"
        )


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, keep: int) -> None:
    """Write `output_dir/checkpoints/step-00001000`, drop all but the newest `keep`. Every process calls it.

    Written under another name and renamed, so that a kill at any moment leaves the last one whole.
    """
    folder = Path(output_dir) / "checkpoints"
    target, partial = folder / f"step-{step:08d}", folder / f"step-{step:08d}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "progress.json").write_text(json.dumps({"step": step}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, output_dir: str | Path, resume_from: str | None) -> int:
    """Load a checkpoint into what was prepared; returns its step, 0 where there is none to load.

    Args:
        resume_from: a checkpoint's folder, "latest" of `output_dir` (a first start if there is none),
            or None.

    Raises:
        UserError: the folder named is no checkpoint.
    """
    if resume_from is None:
        return 0
    if resume_from == "latest":
        found = _checkpoints(Path(output_dir) / "checkpoints")
        if not found:
            return 0
        path = found[-1]
    else:
        path = Path(resume_from)
        if not (path / "progress.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {path}: no checkpoint there; give its folder, or latest"
            )
    accelerator.load_state(str(path))
    logger.info("resumed from %s", path)
    return json.loads((path / "progress.json").read_text())["step"]


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(
        path.parent for path in folder.glob("step-*/progress.json") if path.parent.suffix != ".partial"
    )
