"""Errors that the user can correct: one line, no traceback."""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """A problem of the data, the flags or the machine: one line with the problem and the remedy."""


def run_recipe(main: Callable[[], int | None]) -> None:
    """Run a recipe's `main` and exit with what it returns.

    A `UserError` or a full disk is reported in one line, by one process, with exit status 1.
    """
    message = None
    try:
        status = main()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = str(error)
    if message is not None:  # printed after the error has released main's progress bar, which redraws itself
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        else:
            time.sleep(2)  # a launcher ends all processes when the first fails: let that one report
        status = 1
    sys.exit(status)
