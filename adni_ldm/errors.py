"""Errors that the user can correct: one line, no traceback."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A problem of the data, the flags or the machine: one line with the problem and the remedy."""


def is_disk_error(error: BaseException) -> bool:
    """Whether a full or failing disk raised this; torch and safetensors raise errors of their own for it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    torch_or_safetensors = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    words = ("PytorchStreamWriter", "inline_container", "os error", "I/O error")
    return torch_or_safetensors and any(word in str(error) for word in words)


@contextmanager
def disk_errors(what: str, remedy: str) -> Iterator[None]:
    """Within the block a full or failing disk is a UserError: `what` could not be written, and the remedy."""
    try:
        yield
    except Exception as error:
        if not is_disk_error(error):
            raise
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{what} could not be written ({problem}); {remedy}") from error


def run_recipe(main: Callable[[], int | None]) -> None:
    """Run a recipe's `main` and exit with what it returns.

    A `UserError`, or a full or failing disk, is reported in one line, by one process, with exit status 1.
    """
    message = None
    try:
        status = main()
    except Exception as error:
        if not isinstance(error, UserError) and not is_disk_error(error):
            raise
        message = " ".join(str(error).split())
    if message is not None:  # printed after the error has released main's progress bar, which redraws itself
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        else:
            time.sleep(2)  # a launcher ends all processes when the first fails: let that one report
        status = 1
    sys.exit(status)
