"""Tasks in many processes, each of which receives once what all tasks share."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

from threadpoolctl import threadpool_limits

_work: tuple[Callable, object] | None = None  # of a worker process: function and what the tasks share


def run_tasks(function: Callable, tasks: Sequence, shared: object, workers: int) -> Iterator:
    """Yield function(task, shared) of each task, in order; with one worker in this process."""
    if workers == 1 or len(tasks) < 2:
        yield from (function(task, shared) for task in tasks)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    with ProcessPoolExecutor(min(workers, len(tasks)), spawn, _start_worker, (function, shared)) as pool:
        yield from pool.map(_run_task, tasks)


def _run_task(task: object) -> object:
    function, shared = _work
    return function(task, shared)


def _start_worker(function: Callable, shared: object) -> None:
    global _work
    _work = function, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers, after the current tasks
    threadpool_limits(1)  # a process per core and threads in each would slow each other down
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose main process was killed, before it writes anything more."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
