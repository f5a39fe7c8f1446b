"""kill -9 every command at random moments, start it again, and compare with a run that nothing happened to.

    python benchmarks/faults.py --kills 100            # `make faults KILLS=100`; half an hour on two cores

Each kill has a folder of its own, on a disk and in memory (tmpfs) in turn. At half of the kills the power
fails as well: files are cut back to what was flushed (tests/faults/power_cuts.py). Right after the kill, and
at the end, every safetensors, JSON, PNG, CSV and NumPy file under its final name must be whole. The command
is started again by the same line; it survives if weights, samples, metrics and slices are then byte for byte
those of the undisturbed run, no temporary file is left, and training repeats at most the steps since the last
checkpoint: two, of those that metrics.csv held when the kill came.

A run of train_ldm.py includes the encoding of latents, checkpoints, validation, online evaluation with best/
and the final save. Processes are forks of one that has imported torch; two processes of a training run are
forks with the environment that `accelerate launch` gives them. Writes benchmarks/results/faults_MACHINE.md.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import measure
import nibabel
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/faults"))
from power_cuts import cut_power, record_flushes  # noqa: E402
from tiny_runs import Run, arguments, prepare_imports, starts_of, steps_done, steps_lost  # noqa: E402

STEPS, EVERY = 6, 2  # of a training run, and between its checkpoints
EVALUATION = {"evaluation_steps": 3, "evaluate_images": 6, "classifier_steps": 2, "num_inference_steps": 2}
# How the kills are shared out: (command, processes) and weight.
SHARES = {
    ("train_vae", 1): 25,
    ("train_vae", 2): 15,
    ("train_ldm", 1): 20,
    ("train_ldm", 2): 12,
    ("sample", 1): 13,
    ("prepare_data", 1): 12,
    ("evaluate", 1): 3,
}


class Kills:
    """The undisturbed run of each command, and its kills."""

    def __init__(self, work: Path, memory: Path, seed: int, commands: Sequence[tuple[str, int]]):
        self.work, self.places, self.random = work, {"disk": work, "tmpfs": memory}, random.Random(seed)
        self.rows = defaultdict(
            lambda: [0, 0, 0, 0, []]
        )  # kills, power cuts, files cut, survived, steps lost
        self.number, self.whole, self.seconds = 0, {}, {}
        self.data, self.scans = work / "data", write_scans(work / "scans")
        if any(command != "prepare_data" for command, _ in commands):
            phantom = f"phantom --output_dir {self.data} --subjects 24 --slices 2 --image_size 32"
            self.finish([Run("prepare_data", phantom.split(), work / "log")])
        for command, processes in commands:
            place = work / "undisturbed" / f"{command}{processes}"
            place.mkdir(parents=True)
            start = time.monotonic()
            self.finish(self.start(command, processes, place))
            self.seconds[command, processes] = time.monotonic() - start
            self.whole[command, processes] = outcome(place)
            print(f"{command}, {processes}: {self.seconds[command, processes]:.1f} s", flush=True)

    def words(self, command: str, place: Path) -> list[str]:
        models = self.work / "undisturbed"
        if command.startswith("train"):
            settings = {"data_dir": self.data, "output_dir": place / "run", "max_steps": STEPS}
            settings |= {"checkpointing_steps": EVERY}
            if command == "train_ldm":
                settings |= {
                    "vae": models / "train_vae1/run",
                    "latent_cache": place / "latents",
                    **EVALUATION,
                }
                settings |= {"validation_steps": 3}
            return arguments(command, **settings)
        words = {
            "sample": "--class all --num_images 12 --batch_size 3 --num_inference_steps 2 "
            f"--mixed_precision no --model {models}/train_ldm1/run",
            "evaluate": f"--real {self.data} --samples {models}/sample1/run --classifier_steps 4",
            "prepare_data": f"scans --input_dir {self.scans} --slices 2 --spacing_mm 8 --image_size 16 "
            "--field_of_view_mm 208 --workers 1 --val_fraction 0.25 --test_fraction 0.25",
        }[command]
        return [*words.split(), "--output_dir", str(place / "run")]

    def start(self, command: str, processes: int, place: Path, flushes: Path | None = None) -> list[Run]:
        launched = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        before = (lambda: record_flushes(flushes)) if flushes else None
        return [
            Run(
                command,
                self.words(command, place),
                place / f"log{rank['RANK']}",
                launched | rank if processes > 1 else {},
                before=before,
            )
            for rank in ranks
        ]

    def finish(self, runs: list[Run]) -> None:
        for run in runs:
            status = run.wait(300)
            assert status == 0, f"ended with {status}:\n{run.said()[-3000:]}"

    def kill(self, command: str, processes: int, filesystem: str, power_cut: bool) -> None:
        self.number += 1
        place = self.places[filesystem] / f"{self.number:03d}-{command}"
        place.mkdir()
        flushes = self.work / f"{self.number:03d}-flushes"
        key = command, processes
        while True:
            runs = self.start(command, processes, place, flushes)
            end = time.monotonic() + self.random.uniform(0.02, 1.0) * self.seconds[key]
            while time.monotonic() < end and all(run.poll() is None for run in runs):
                time.sleep(0.001)
            if all(run.poll() is None for run in runs):
                break
            self.finish(runs)  # faster than the undisturbed run: nothing was broken
            shutil.rmtree(place)
            place.mkdir()
        for run in runs:
            os.killpg(run.pid, signal.SIGKILL)
        for run in runs:
            run.kill()
        done = steps_done(place / "run")
        cut = cut_power(place, flushes) if power_cut else 0
        broken = [path for path in whole_files(place) if not is_whole(path, power_cut)]
        before = [] if broken else starts_of(place / "run")
        self.finish(self.start(command, processes, place))
        broken += [path for path in whole_files(place) if not is_whole(path)]
        left = [path for path in place.rglob("*") if path.name.endswith(".partial") or path.name == ".lock"]
        found, whole = outcome(place), self.whole[key]
        differing = sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))
        lost = steps_lost(done, before, starts_of(place / "run"))
        survived = not (broken or left or differing) and lost <= EVERY
        if not survived:
            problems = f"broken {broken}, left {left}, differing {differing}, {lost} steps lost"
            print(f"{place}: {problems}", flush=True)
        row = self.rows[(*key, filesystem)]
        row[0] += 1
        row[1] += power_cut
        row[2] += cut
        row[3] += survived
        if command.startswith("train"):
            row[4].append(lost)
        if survived:
            shutil.rmtree(place)

    def table(self) -> list[str]:
        header = ("command", "processes", "folder on", "kills", "of these with a power cut", "files cut back")
        lines = []
        for (command, processes, filesystem), (kills, cuts, files, survived, lost) in sorted(
            self.rows.items()
        ):
            steps = f"{np.mean(lost):.1f} ({max(lost)})" if lost else ""
            lines.append((f"{command}.py", processes, filesystem, kills, cuts, files, survived, steps))
        return measure.table((*header, "survived", "steps lost, mean (most)"), lines)

    @property
    def counts(self) -> tuple[int, int]:
        """Kills, and survived ones."""
        return sum(row[0] for row in self.rows.values()), sum(row[3] for row in self.rows.values())


def whole_files(place: Path) -> list[Path]:
    """Files under their final names."""
    files = (path for path in sorted(place.rglob("*")) if path.is_file())
    return [path for path in files if not any(part.endswith(".partial") for part in path.parts)]


def is_whole(path: Path, power_cut: bool = False) -> bool:
    """Whether a file can be read to its end. A power cut may shorten metrics.csv, which is appended to."""
    try:
        if path.suffix == ".safetensors":
            return bool(load_file(path))
        if path.suffix == ".json":
            return bool(json.loads(path.read_text()))
        if path.suffix == ".npy":
            return np.load(path).size > 0
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        if path.suffix == ".csv" and not (power_cut and path.name == "metrics.csv"):
            lines = path.read_text().splitlines(keepends=True)
            rows = list(csv.reader(lines))
            return lines[-1].endswith("\n") and len({len(row) for row in rows}) == 1
        if path.suffix in (".html", ".bin", ".pkl", ".py"):
            return path.stat().st_size > 0
    except Exception:  # each library has its own for a file that is cut
        return False
    return True


def outcome(place: Path) -> dict[str, str]:
    """SHA-256 of what a command leaves: all but checkpoints, and what names the folder or the time."""
    run = place / "run"
    skipped = {"run.json", "training_config.json", "manifest.json", "report.html"}
    skipped |= {"pipeline.py"}  # a copy of the source
    found = {}
    for path in whole_files(run):
        name = path.relative_to(run)
        if not {"checkpoints", ".scans"} & set(name.parts) and name.name not in skipped:
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def write_scans(folder: Path) -> Path:
    """Sixteen subjects in BIDS, each a bright ellipsoid with noise, 48 voxels of 4 mm a side."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(48) - 23.5] * 3, indexing="ij"))
    brain = (grid**2).sum(axis=0) < 18**2
    lines = ["participant_id\tgroup\tage\tsex"]
    for number in range(16):
        place = folder / f"sub-{number:02d}/anat"
        place.mkdir(parents=True)
        voxels = brain * rng.integers(300, 1000, brain.shape)
        image = nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([4.0, 4.0, 4.0, 1.0]))
        nibabel.save(image, place / f"sub-{number:02d}_T1w.nii.gz")
        lines.append(f"sub-{number:02d}\t{'AD' if number % 2 else 'NC'}\t70\tF")
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", nargs="*", help="such as train_vae train_ldm; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="adni_ldm_kills_"))
    in_memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    memory = Path(tempfile.mkdtemp(prefix="adni_ldm_kills_", dir=in_memory))
    os.environ |= {"HF_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NUMBA_CACHE_DIR": str(work / "numba")}
    os.environ |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    prepare_imports("sample", "evaluate", "prepare_data", "adni_ldm.evaluation.online")
    shares = {key: share for key, share in SHARES.items() if key[0] in (options.commands or (key[0],))}
    kills = Kills(work, memory, options.seed, list(shares))
    total, moments = sum(shares.values()), []
    for key, share in shares.items():
        moments += [key] * max(1, round(options.kills * share / total))
    kills.random.shuffle(moments)
    start = time.monotonic()
    try:
        for number, (command, processes) in enumerate(moments):
            kills.kill(command, processes, ("disk", "tmpfs")[number % 2], power_cut=number // 2 % 2 == 1)
            print(f"{number + 1} of {len(moments)}: {command}, {time.monotonic() - start:.0f} s", flush=True)
    finally:
        tried, survived = kills.counts
        lines = [f"{tried} kills, {survived} survived, seed {options.seed}.", "", *kills.table()]
        measure.report("faults", "Kills and power cuts", lines, options.out)
    if tried == survived:
        shutil.rmtree(work)
        shutil.rmtree(memory)
    return int(tried != survived)


if __name__ == "__main__":
    sys.exit(main())
