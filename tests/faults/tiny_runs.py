"""Recipes as processes of their own that start in a fraction of a second: forks of one that has the imports.

They are killed, signalled and started again like any other. Nothing is computed before the fork, so no thread
is lost by it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMON = {"image_size": 16, "batch_size": 2, "log_steps": 1, "warmup_steps": 1, "mixed_precision": "no"}
COMMON |= {"learning_rate": 1e-3, "report_to": "none", "resume_from_checkpoint": "latest", "use_ema": "true"}
COMMON |= {"gradient_accumulation_steps": 2}
SMALL = {
    "train_vae": COMMON | {"widths": [8, 8], "eval_images": 2},
    "train_ldm": COMMON
    | {"unet_widths": [32, 32], "token_dim": 16, "layers_per_block": 1, "validation_steps": 0},
}
WEIGHTS = {
    "train_vae": "diffusion_pytorch_model.safetensors",
    "train_ldm": "unet/diffusion_pytorch_model.safetensors",
}


def prepare_imports(*more: str) -> None:
    """Import the recipes, and more modules; what is started afterwards has them."""
    sys.path.insert(0, str(ROOT))
    for recipe in (*SMALL, *more):
        importlib.import_module(recipe)
    import torch

    torch.set_num_threads(1)


def arguments(recipe: str, **settings) -> list[str]:
    """Command line of a small run."""
    words = []
    for name, value in (SMALL[recipe] | settings).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *[str(entry) for entry in values]]
    return words


class Run:
    """A recipe in a process group of its own.

    Args:
        largest_file: bytes that a file may grow to: a write beyond fails, as on a full disk.
        before: called in the new process before the recipe.
    """

    def __init__(
        self,
        recipe: str,
        words: Sequence[str],
        log: Path,
        environment: dict[str, str] | None = None,
        largest_file: int | None = None,
        before: Callable[[], None] | None = None,
    ):
        self.log, self.status = log, None
        self.pid = os.fork()
        if self.pid == 0:
            self._become(recipe, words, environment or {}, largest_file, before)

    def _become(self, recipe, words, environment, largest_file, before) -> None:
        code = 70
        try:
            os.setsid()
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.environ.update(environment)
            if largest_file:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            if before:
                before()
            sys.argv = [f"{recipe}.py", *words]
            from adni_ldm.config import run_command
            from adni_ldm.errors import run_recipe

            try:
                module = sys.modules[recipe]
                commands = getattr(module, "COMMANDS", None)
                run_recipe(module.main if not commands else lambda: run_command(module.__doc__, commands))
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status

    def wait(self, seconds: float = 120) -> int:
        """Exit code once it has ended; a run that does not end is an error, and is ended."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s:\n{self.said()[-2000:]}")
            time.sleep(0.002)
        return self.status

    def send(self, number: int) -> None:
        """Send a signal to this process alone, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.send(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    def said(self) -> str:
        """Its output, and that of earlier runs with the same log."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""


def finish(recipe: str, words: Sequence[str], log: Path, **options) -> Run:
    """Run to the end, which must be a good one."""
    run = Run(recipe, words, log, **options)
    status = run.wait()
    assert status == 0, f"{recipe} ended with {status}:\n{run.said()[-3000:]}"
    return run


def weights_of(recipe: str, folder: Path) -> str:
    """SHA-256 of the weights that a finished run left."""
    return hashlib.sha256((folder / WEIGHTS[recipe]).read_bytes()).hexdigest()


def steps_done(folder: Path) -> int:
    """Last step that is in metrics.csv."""
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    numbers = [line.split(",")[0] for line in lines]
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def starts_of(folder: Path) -> list[int]:
    """Step that each start went on from. One of a run that is already finished is no start."""
    path = folder / "run.json"
    return [start["step"] for start in json.loads(path.read_text())["starts"]] if path.is_file() else []


def steps_lost(done: int, before: list[int], after: list[int]) -> int:
    """Steps that were trained again, of those in metrics.csv, where `before` and `after` are the starts.

    A run that was killed when it was finished has no later start, and lost nothing.
    """
    return max(0, done - after[-1]) if len(after) > len(before) else 0


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step-????????")
    return sorted(path for path in found if (path / "progress.json").is_file())


def wait_for(condition, run: Run, seconds: float = 60) -> bool:
    """Whether the condition came true before the run ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if run.poll() is not None:
            return condition()
        time.sleep(0.0005)
    return False
