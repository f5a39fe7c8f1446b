"""Errors that are the user's to mend: one line, no traceback."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


class UserError(ValueError):
    """Something about the data, the flags or the machine, said in one line with what to do about it."""


def run_recipe(main: Callable[[], int | None]) -> None:
    """Run a recipe's `main` and exit with what it returns.

    A `UserError` and a full disk are told in one line, on one process, with status 1.
    """
    message = None
    try:
        status = main()
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        message = str(error)
    if message is not None:  # said once the error has let go of main's progress bar, which draws as it ends
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        else:
            time.sleep(2)  # a launcher ends all when the first one fails: let that be the one that speaks
        status = 1
    sys.exit(status)
