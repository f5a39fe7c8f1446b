"""Run a recipe unchanged and write its speed and memory as JSON:

    python benchmarks/profile_recipe.py OUT.json train_ldm.py --max_steps 40

Speed is measured between the lines of its log, including everything in between. Works under `accelerate
launch` as well, where the main process writes.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch  # noqa: E402

from adni_ldm.training.metrics import MetricsLogger  # noqa: E402


def own_gib() -> float:
    """Memory of this process without mapped files, which the system can reclaim, GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def peak_gib() -> float:
    """Peak memory so far, GiB: the GPU's, or the resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    out, recipe = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    stamps: list[tuple[int, float]] = []
    own: list[float] = []
    write_means = MetricsLogger.write_means

    def stamped(log, step, **values):
        line = write_means(log, step, **values)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamps.append((step, time.perf_counter()))
        return line

    def record_memory():
        while True:
            own.append(own_gib())
            time.sleep(0.1)

    MetricsLogger.write_means = stamped
    threading.Thread(target=record_memory, daemon=True).start()
    started = time.perf_counter()
    try:
        runpy.run_path(recipe, run_name="__main__")
    finally:
        if os.environ.get("RANK", "0") == "0":
            warm = stamps[len(stamps) // 3 :]
            speed = (warm[-1][0] - warm[0][0]) / (warm[-1][1] - warm[0][1]) if len(warm) > 1 else None
            result = {"steps_per_second": speed, "GiB": peak_gib(), "own_GiB": max(own)}
            result["seconds"] = time.perf_counter() - started
            Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
