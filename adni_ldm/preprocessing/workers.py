"""Tasks in many processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

from threadpoolctl import threadpool_limits

_function: Callable | None = None  # of a worker process


def run_tasks(function: Callable, tasks: Sequence, workers: int) -> Iterator:
    """Yield function(task) of each task, in order; one worker is this process.

    A process receives the function, with what a partial function holds, once.
    """
    if workers == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with ProcessPoolExecutor(min(workers, len(tasks)), spawn, _start_worker, (function,)) as pool:
        yield from pool.map(_run_task, tasks)


def _run_task(task: object) -> object:
    return _function(task)


def _start_worker(function: Callable) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers, after the current tasks
    threadpool_limits(1)  # a process per core and threads in each would slow each other down
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose main process was killed, before it writes anything more."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
