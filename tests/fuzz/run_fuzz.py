"""Mutate valid files of each format, and read them as untrusted ones are read.

    python tests/fuzz/run_fuzz.py                       # 10,000 inputs of each format
    python tests/fuzz/run_fuzz.py --write --resume runs/fuzz    # `make fuzz`: goes on after an interruption
    python tests/fuzz/run_fuzz.py NIfTI --inputs 200    # one format
    python tests/fuzz/run_fuzz.py NIfTI --only 137      # input 137 again, with its traceback

An input is refused with a UserError or VolumeError, which our commands report in one line, or accepted.
Anything else is a finding: another exception, more than 1 GB of memory above the process's own, more than
60 s, a file written outside the working folder, a program started, a connection, or the death of the process.
Input k of a format depends on k alone. Each format has one process, which reads its inputs one after another;
--workers formats run at once, the slowest first. Prints a table, writes docs/fuzzing.md with --write, and
ends with status 1 if there are findings.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import TextIO

import numpy as np

ROOT = Path(__file__).parents[2]
MOST_MEMORY, MOST_SECONDS = 1e9, 60
NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)
WORDS = (
    "-1 0 1e999 -1e999 nan inf 99999999999999999999 null true [] {} '' \" ' , : ; = - @ # & * ! | "
    "> % \\ \0 \n \t ../x /etc/passwd .. \ufeff \udcff é [[[[[[[[ {{{{{{{{ "
    "!!python/object/apply:os.system &a *a <<: ~"
).split(" ")
SLOWEST_FIRST = ("safetensors", "DICOM", "CSV", "model_index", "zip", "NIfTI", "YAML", "PNG", "JPEG")
HEADER = (
    "| format | inputs | refused | accepted | findings | most memory, MB | longest time, s |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


class OutOfTime(BaseException):
    """An input took too long; no reader catches it."""


def mutate(rng: np.random.Generator, content: bytes, text: bool) -> bytes:
    """Change one or more places of a valid input, half of them in its first 512 bytes."""
    data = bytearray(content)
    for _ in range(rng.geometric(0.5)):
        end = len(data) if rng.random() < 0.5 else min(len(data), 512)
        at, kind = int(rng.integers(end + 1)), rng.integers(7 if text else 6)
        length = int(2 ** rng.uniform(0, 8))
        if kind == 0:  # a bit
            data[at : at + 1] = bytes(byte ^ 1 << int(rng.integers(8)) for byte in data[at : at + 1])
        elif kind == 1:  # random bytes
            data[at : at + length] = rng.bytes(length)
        elif kind == 2:  # a number of 1 to 8 bytes, positive or negative
            size, number = int(2 ** rng.integers(4)), int(rng.choice(NUMBERS)) * int(rng.choice((-1, 1)))
            order = "little" if rng.random() < 0.5 else "big"
            data[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, order)
        elif kind == 3:  # cut out a piece, or the rest
            del data[at : at + length if rng.random() < 0.8 else None]
        elif kind == 4:  # repeat a piece
            data[at:at] = data[at : at + length] * int(2 ** rng.uniform(0, 6))
        elif kind == 5:  # move a piece
            start = int(rng.integers(len(data) + 1))
            data[at : at + length] = data[start : start + length]
        else:
            word = WORDS[rng.integers(len(WORDS))] * int(2 ** rng.uniform(0, 4))
            data[at : at + (length if rng.random() < 0.5 else 0)] = word.encode("utf-8", "surrogatepass")
    return bytes(data)


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def watch(folder: Path) -> list[str]:
    """List, from now on, what is written outside `folder`, started or connected to."""
    seen: list[str] = []
    writes = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "shutil.rmtree")
    mine = ("/dev/null", "/proc/self/clear_refs")
    runs = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            paths = [path] if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else []
        else:  # relative to an open folder, it is a step of shutil.rmtree, which has an event of its own
            below = isinstance(arguments[-1], int) and arguments[-1] >= 0
            paths = arguments if event in writes and not below else ()
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)) and (name := os.fsdecode(path)) not in mine:
                if not Path(os.path.realpath(name)).is_relative_to(folder):
                    seen.append(f"{event} {name}")
        if event in runs:
            seen.append(f"{event} {arguments[0]}"[:200])

    sys.addaudithook(hook)
    return seen


def one_input(name: str, seeds: list[bytes], number: int, formats) -> tuple[bytes, int]:
    """Input `number` of a format, and the number of the seed it is made from."""
    rng = np.random.default_rng([formats.FORMATS.index(name), number])
    seed = int(rng.integers(len(seeds)))
    if name == "zip" and rng.random() < 0.5:
        return formats.zip_of_names(lambda content: mutate(rng, content, True)), seed
    content = mutate(rng, seeds[seed], name in formats.TEXT)
    return (formats.repair_png(content) if name == "PNG" and rng.random() < 0.8 else content), seed


def work(name: str, numbers: range, folder: Path, progress: Path, parent: int) -> None:
    """Read the inputs of a format; after each, `progress` has the counts. Ends with the process `parent`."""
    import formats

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries warn of
    reader, seeds = formats.reader(name, folder), formats.seeds(name, folder)
    reader(seeds[0], 0)  # what is imported or cached at the first use
    counts = read_progress(progress)
    begin = time.monotonic() - counts["total_seconds"]

    def too_long(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, too_long)
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + int(4 * MOST_MEMORY),) * 2)  # spares the machine
    with progress.open("r+") as file:
        seen = watch(folder)
        for number in numbers:
            note_progress(file, counts | {"at": number, "total_seconds": time.monotonic() - begin})
            if os.getppid() != parent:  # which was killed: the next start goes on from here
                return
            content, seed = one_input(name, seeds, number, formats)
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
            before, start, finding = memory("VmRSS"), time.monotonic(), ""
            signal.alarm(MOST_SECONDS)
            try:
                reader(content, seed)
                counts["accepted"] += 1
            except formats.REFUSALS:
                counts["refused"] += 1
            except (Exception, OutOfTime) as error:
                where = traceback.extract_tb(error.__traceback__)
                own = [frame for frame in where if "adni_ldm/" in frame.filename] or where
                place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
                finding = f"{type(error).__name__}: {str(error)[:150]} at {place}"
            signal.alarm(0)
            used = memory("VmHWM") - before
            counts["memory"] = max(counts["memory"], used)
            counts["seconds"] = max(counts["seconds"], time.monotonic() - start)
            finding = finding or (f"{used / 1e6:.0f} MB" if used > MOST_MEMORY else "") or "; ".join(seen)
            if finding:
                counts["findings"].append([number, finding])
            seen.clear()
        note_progress(file, counts | {"at": numbers.stop, "total_seconds": time.monotonic() - begin})


def note_progress(file: TextIO, counts: dict) -> None:
    """Write the counts, in one line, over those before."""
    file.seek(0)
    file.write(json.dumps(counts) + "\n")
    file.truncate()
    file.flush()


def progress_file(folder: Path, name: str, inputs: int) -> Path:
    return folder / f"{name}-{inputs}.json"


def read_progress(path: Path) -> dict:
    """The counts; of a file that a kill left between `write` and `truncate`, those of its first line."""
    return json.loads(path.read_text().partition("\n")[0])


def code_hash() -> str:
    """SHA-256 of what is fuzzed and of what fuzzes: a run goes on only where neither has changed."""
    total = hashlib.sha256()
    for path in sorted([*(ROOT / "adni_ldm").rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        total.update(path.read_bytes())
    return total.hexdigest()


def start_or_continue(progress: Path) -> dict:
    """Counts of an interrupted run of this code on this Python, else those of a new one."""
    counts = {"accepted": 0, "refused": 0, "memory": 0, "seconds": 0.0, "findings": [], "at": 0}
    counts |= {"total_seconds": 0.0, "code": code_hash(), "python": sys.version}
    try:
        found = read_progress(progress)
        return found if all(found[key] == counts[key] for key in ("code", "python")) else counts
    except (OSError, ValueError, KeyError):
        return counts


def fuzz(name: str, inputs: int, state: Path | None) -> dict:
    """Counts of a format: its process is started anew where an input ends it.

    Args:
        state: folder in which the counts are kept after each input; a later call goes on from them.
    """
    folder = Path(tempfile.mkdtemp(prefix="adni_ldm_fuzz_")).resolve()
    try:
        progress = progress_file(state or folder, name, inputs)
        counts = start_or_continue(progress)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "cache"),
        }
        environment |= {
            "TMPDIR": str(folder / "tmp"),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        (folder / "tmp").mkdir()
        while counts["at"] < inputs:
            progress.write_text(json.dumps(counts))
            words = [sys.executable, __file__, name, "--work", str(folder), "--progress", str(progress)]
            words += ["--first", str(counts["at"]), "--inputs", str(inputs), "--parent", str(os.getpid())]
            ended = subprocess.run(words, env=environment, capture_output=True, text=True)
            last, counts = counts["at"], read_progress(progress)
            if ended.returncode in (-signal.SIGINT, -signal.SIGTERM):  # sent to the whole group
                raise SystemExit("interrupted")
            if ended.returncode:
                if counts["at"] == last and not counts["accepted"] + counts["refused"]:
                    raise RuntimeError(f"{name}: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
                counts["findings"].append([counts["at"], f"the process ended with status {ended.returncode}"])
                counts["at"] += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def row(name: str, counts: dict) -> str:
    total = counts["refused"] + counts["accepted"] + len(counts["findings"])
    cells = [name, f"{total:,}", f"{counts['refused']:,}", f"{counts['accepted']:,}", len(counts["findings"])]
    return (
        "| "
        + " | ".join(map(str, [*cells, f"{counts['memory'] / 1e6:.0f}", f"{counts['seconds']:.1f}"]))
        + " |"
    )


def page(rows: list[str], workers: int, seconds: float) -> str:
    """docs/fuzzing.md; `seconds` are those of all processes."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return f"""# Fuzzing

Valid files of each format with random changes, read as untrusted files are: `make fuzz` makes this table
(`tests/fuzz/run_fuzz.py`). An input is refused with one line, or accepted. Findings are anything else:
another exception, more than 1 GB of memory above the process's own, more than 60 s, a file written outside
the working folder, a program that was started, a connection, or a crash.

{HEADER}
{chr(10).join(rows)}

{date.today()}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}. Memory and time are the
most that one input took. {workers} formats at once; the processes took {seconds / 60:.0f} minutes together.

NIfTI and DICOM are scans of 24³ voxels; zip is unpacked and listed; CSV is a study table or a metadata.csv;
YAML the settings of a recipe or of sample.py; safetensors the weights of an autoencoder or a LoRA;
model_index any JSON file of a pipeline.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("formats", nargs="*", help="default: all")
    parser.add_argument("--inputs", type=int, default=10_000, help="of each format")
    parser.add_argument("--only", type=int, help="one input, in this process")
    parser.add_argument("--write", action="store_true", help="write docs/fuzzing.md")
    parser.add_argument("--workers", type=int, default=1, help="formats at once, a core each")
    parser.add_argument("--resume", type=Path, help="folder in which an interrupted run is kept, and goes on")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--progress", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        numbers = range(options.first, options.inputs)
        work(options.formats[0], numbers, options.work, options.progress, options.parent)
        return 0
    if options.only is not None:
        import formats

        with tempfile.TemporaryDirectory() as folder:
            name, seeds = options.formats[0], formats.seeds(options.formats[0], Path(folder))
            content, seed = one_input(name, seeds, options.only, formats)
            print(f"seed {seed}, {len(content)} bytes: {content[:300]!r}")
            formats.reader(name, Path(folder))(content, seed)
        return 0
    if options.resume:
        options.resume.mkdir(parents=True, exist_ok=True)
    chosen = sorted(options.formats or SLOWEST_FIRST, key=SLOWEST_FIRST.index)
    found = {}
    print(HEADER, flush=True)
    with ThreadPoolExecutor(options.workers) as pool:
        started = pool.map(lambda name: (name, fuzz(name, options.inputs, options.resume)), chosen)
        for name, counts in started:
            found[name] = counts
            print(row(name, counts), flush=True)
            for number, finding in counts["findings"][:20]:
                print(f"{name} input {number}: {finding}", file=sys.stderr, flush=True)
    if options.write:
        rows = [row(name, found[name]) for name in chosen]
        seconds = sum(counts["total_seconds"] for counts in found.values())
        (ROOT / "docs/fuzzing.md").write_text(page(rows, options.workers, seconds))
    if options.resume:  # finished: the next run starts anew
        for name in chosen:
            progress_file(options.resume, name, options.inputs).unlink()
    return int(any(counts["findings"] for counts in found.values()))


if __name__ == "__main__":
    sys.exit(main())
