"""Visitors of app.py at once, on this machine: each is answered or told to wait, none sees another's slice.

    python benchmarks/page_load.py --model runs/demo/ldm            # 50 visitors, 2 minutes
    python benchmarks/page_load.py --visitors 5 --seconds 20        # on a pipeline with random weights

Each visitor uploads slices of its own, which are shown to it, and samples with a seed of its own, until the
time is over. Writes benchmarks/results/page_load_MACHINE.md; ends with status 1 if a visitor got an error, or
a slice of another.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
from measure import RESULTS, ROOT, report, table
from PIL import Image

sys.path.insert(0, str(ROOT / "tests"))

from stand_ins import blob_image, make_pipeline  # noqa: E402

from adni_ldm.data.slices import prepare_image  # noqa: E402

MOST_SECONDS = 600
MOST_GROWTH_MB = 200  # of the server's memory, after its first quarter


class Visitor:
    """One visitor: its requests, and what it saw."""

    def __init__(self, address: str, functions: dict[str, int], number: int):
        self.client = httpx.Client(base_url=f"{address}/gradio_api", timeout=MOST_SECONDS)
        self.functions, self.number = functions, number
        self.answered, self.waited, self.seconds, self.problems = 0, 0, [], []
        self.samples: set[bytes] = set()

    def visit(self, until: float) -> None:
        """Upload and sample in turn."""
        turn = 0
        while time.monotonic() < until and not self.problems:
            try:
                self.upload(turn)
                self.sample()
            except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                self.problems.append(f"{type(error).__name__}: {str(error)[:100]}")
            turn += 1
        if len(self.samples) > 1:
            self.problems.append("one seed, several slices")

    def upload(self, turn: int) -> None:
        file = io.BytesIO()
        image = blob_image((self.number, turn), 96, 90)
        image.save(file, "PNG")
        paths = self.client.post("/upload", files={"files": ("a.png", file.getvalue())}).json()
        shown = self.call(
            "upload", [{"path": paths[0], "meta": {"_type": "gradio.FileData"}}, None, None][:1]
        )
        got = np.asarray(Image.open(io.BytesIO(first_png(shown))))
        if not np.array_equal(got, prepare_image(image, len(got))):
            self.problems.append("another slice than the uploaded one")

    def sample(self) -> None:
        shown = self.call("sample", [self.functions["class"], 1, 2, 1, self.number])
        self.samples.add(first_png(shown))

    def call(self, name: str, data: list) -> str:
        """The last output of a function of the page, as text; asks again while the queue is full."""
        session, start = uuid.uuid4().hex, time.monotonic()
        body = {"data": data, "fn_index": self.functions[name], "session_hash": session}
        while (joined := self.client.post("/queue/join", json=body)).status_code == 503:
            self.waited += 1
            time.sleep(1)
        joined.raise_for_status()
        shown = ""
        with self.client.stream("GET", "/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_generating" and not shown:
                    shown = json.dumps(message["output"])
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise ValueError(f"refused: {message['output']}")
                    last = json.dumps(message["output"])
                    self.answered += 1
                    self.seconds.append(time.monotonic() - start)
                    return last if "base64" in last else shown
        raise ValueError("the connection ended without an answer")


def first_png(shown: str) -> bytes:
    """The first image of an output."""
    return base64.b64decode(re.search(r"data:image/png;base64,([\w+/=]+)", shown)[1])


def resident_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def measure(address: str, process: int, visitors: int, seconds: float) -> tuple[list[Visitor], list[float]]:
    """Let them visit; returns them, and the server's memory at each second, MB."""
    config = httpx.get(f"{address}/config").json()
    functions = {kind: entry["id"] for entry in config["dependencies"] for kind in {entry["targets"][0][1]}}
    clicks = [entry["id"] for entry in config["dependencies"] if entry["targets"][0][1] == "click"]
    radio = next(entry for entry in config["components"] if entry["type"] == "radio")
    functions |= {"sample": clicks[0], "class": radio["props"]["value"]}
    crowd = [Visitor(address, functions, number) for number in range(visitors)]
    memory, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(1):
            memory.append(resident_mb(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(visitors) as pool:
        list(pool.map(lambda visitor: visitor.visit(time.monotonic() + seconds), crowd))
    over.set()
    watcher.join()
    return crowd, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="default: a pipeline with random weights, of 16 x 16 pixels")
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120, help=f"at most {MOST_SECONDS}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_pipeline().save_pretrained(Path(folder) / "ldm")
        model, log = options.model or str(Path(folder) / "ldm"), Path(folder) / "log"
        words = [sys.executable, "-u", "app.py", "--model", model, "--port", "0", "--max_upload_mb", "1"]
        server = subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": folder},
        )
        try:
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                if server.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.2)
            seconds = min(options.seconds, MOST_SECONDS)
            crowd, memory = measure(found.group(), server.pid, options.visitors, seconds)
        finally:
            server.terminate()
            server.wait()
    problems = [problem for visitor in crowd for problem in visitor.problems]
    seen = [image for visitor in crowd for image in visitor.samples]
    if len(set(seen)) < len(seen):
        problems.append("two seeds, one slice")
    times = np.array([second for visitor in crowd for second in visitor.seconds])
    settled = max(memory[: max(1, len(memory) // 4)])
    if max(memory) - settled > MOST_GROWTH_MB:
        problems.append(f"memory grew by {max(memory) - settled:.0f} MB")
    header = [
        "visitors",
        "s",
        "answered",
        "told to wait",
        "unanswered visitors",
        "problems",
        "median, s",
        "95 %, s",
    ]
    header += ["memory after a quarter, MB", "at most, MB"]
    row = [options.visitors, f"{seconds:.0f}", len(times), sum(visitor.waited for visitor in crowd)]
    row += [sum(not visitor.answered for visitor in crowd), len(problems)]
    row += [
        f"{np.median(times):.1f}",
        f"{np.quantile(times, 0.95):.1f}",
        f"{settled:.0f}",
        f"{max(memory):.0f}",
    ]
    lines = [*table(header, [row]), "", *sorted(set(problems))[:10]]
    report("page_load", "Visitors of the page at once", lines, options.results)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
