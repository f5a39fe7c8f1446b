"""The machine: whether torch and torchvision match, whether processes share a GPU, installed versions."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# The torch and torchvision of constraints.txt; a test compares them.
TESTED_PAIR = ("2.15.0", "0.29.2")


def check_torch_pair() -> None:
    """Import torchvision; if it was built for another torch than the one installed, exit with one line.

    The package calls this before it imports diffusers, where the mismatch (a CPU-only torch with the usual
    torchvision wheel) becomes `Could not import module 'BloomPreTrainedModel'`. SystemExit has both versions,
    the cause, and the command that fixes it.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        found = dict.fromkeys(("torch", "torchvision"), "(not installed)")
        found |= installed_versions(found)
        pip = f"pip install --force-reinstall torch=={TESTED_PAIR[0]} torchvision=={TESTED_PAIR[1]}"
        cause = " ".join(str(error).split())  # one line
        raise SystemExit(
            f"error: torch {found['torch']} and torchvision {found['torchvision']} do not work "
            f"together ({cause}); install a pair that does: {pip}"
        ) from error


def processes_without_gpu() -> bool:
    """Whether a launcher started several processes and no GPU is visible; for `Accelerator(cpu=...)`.

    Without that argument each process treats itself as the only one: gradients are not averaged, and all
    processes write to the same folder.
    """
    import torch

    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Version of Python and of those packages that are installed."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
