"""Interrupt and damage training in every known way, resume it, and compare with an undisturbed run.

    python tests/faults/run_faults.py            # 20 kills and the rest: minutes; `make faults`
    python tests/faults/run_faults.py --short    # a part of it, for `make test`

Each fault has a run of its own, of a small VAE or LDM with an average of the weights, accumulated gradients
and a checkpoint every two steps. It survives if the run, started again by the same command line, leaves
weights with the SHA-256 of the run that nothing happened to. Prints a table, and ends with status 1 if one
did not.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_runs import (
    ROOT,
    Run,
    arguments,
    checkpoints,
    finish,
    prepare_imports,
    starts_of,
    steps_done,
    steps_lost,
    wait_for,
    weights_of,
)

STEPS, EVERY = 12, 2


class Faults:
    """The faults, each a method that breaks a run; the table is kept here."""

    def __init__(self, work: Path, seed: int):
        self.work, self.random = work, random.Random(seed)
        self.rows = defaultdict(lambda: [0, 0, []])  # fault: tried, survived, steps lost
        self.number = 0
        self.data = write_slices(work / "data")
        self.settings = {"data_dir": self.data, "max_steps": STEPS, "checkpointing_steps": EVERY}
        self.whole, self.seconds = {}, {}
        for recipe in ("train_vae", "train_ldm"):
            start = time.monotonic()
            folder = work / "undisturbed" / recipe
            finish(recipe, self.words(recipe, folder), work / f"{recipe}.log")
            self.whole[recipe], self.seconds[recipe] = weights_of(recipe, folder), time.monotonic() - start

    def words(self, recipe: str, folder: Path, **more) -> list[str]:
        vae = {"vae": self.work / "undisturbed/train_vae"} if recipe == "train_ldm" else {}
        return arguments(recipe, output_dir=folder, **self.settings, **vae, **more)

    def start(self, recipe: str, name: str, **options) -> tuple[Run, Path]:
        """A new run, and its folder."""
        self.number += 1
        folder = self.work / f"{self.number:03d}-{name}"
        folder.mkdir()
        return Run(recipe, self.words(recipe, folder), folder / "log", **options), folder

    def resume(self, fault: str, recipe: str, folder: Path) -> str:
        """Resume the broken run, and record whether it ends like the undisturbed one; returns its output."""
        done, before = steps_done(folder), starts_of(folder)
        said = finish(recipe, self.words(recipe, folder), folder / "log").said()
        lost = steps_lost(done, before, starts_of(folder))
        self.note(fault, weights_of(recipe, folder) == self.whole[recipe], lost)
        shutil.rmtree(folder)
        return said

    def note(self, fault: str, survived: bool, lost: int) -> None:
        row = self.rows[fault]
        row[0] += 1
        row[1] += survived
        row[2].append(lost)

    # ---- The faults ----------------------------------------------------------------------------------------

    def kill_anywhere(self, recipe: str) -> None:
        """From the first import to the last file: most hit the middle, some the start and the end."""
        run, folder = self.start(recipe, "kill")
        end = time.monotonic() + self.random.uniform(0.02, 1.0) * self.seconds[recipe]
        while time.monotonic() < end and run.poll() is None:
            time.sleep(0.0005)
        if run.poll() is not None:  # it was faster than the undisturbed one: nothing was broken
            shutil.rmtree(folder)
            return self.kill_anywhere(recipe)
        run.kill()
        self.resume("kill -9 at a random moment", recipe, folder)

    def kill_while_saving(self, recipe: str) -> None:
        """Between the partial folder's first file and its new name; what is left of it is the proof."""
        for _ in range(20):
            run, folder = self.start(recipe, "kill-saving")
            step = self.random.randrange(EVERY, STEPS, EVERY)
            partial = folder / f"checkpoints/step-{step:08d}.partial"
            wait_for(partial.is_dir, run)
            time.sleep(self.random.uniform(0, 0.02))
            run.kill()
            if partial.is_dir():
                return self.resume("kill -9 while a checkpoint is written", recipe, folder)
            shutil.rmtree(folder)
        raise AssertionError("no kill fell into the writing of a checkpoint")

    def signalled(self, recipe: str, number: signal.Signals) -> None:
        """To the whole group, the workers that read slices ahead included, as a cluster does."""
        self.settings["num_workers"] = 1 if recipe == "train_vae" else 0
        run, folder = self.start(recipe, number.name)
        step = self.random.randrange(1, STEPS - 2)
        wait_for(lambda: steps_done(folder) >= step, run)
        os.killpg(run.pid, number)
        status = run.wait()
        assert status == 128 + number, f"{number.name}: ended with {status}, not {128 + number}\n{run.said()}"
        self.resume(number.name, recipe, folder)

    def damaged(self, recipe: str, kind: str) -> None:
        """A file of the last checkpoint is cut or has a bit turned: the one before is taken, and said so."""
        run, folder = self.start(recipe, kind)
        wait_for(lambda: steps_done(folder) >= STEPS - 3, run)
        run.kill()
        last = checkpoints(folder)[-1]
        file = self.random.choice(sorted(path for path in last.iterdir() if path.stat().st_size))
        content = bytearray(file.read_bytes())
        if kind == "truncated":
            content = content[: self.random.randrange(len(content))]
        else:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        file.write_bytes(content)
        said = self.resume(f"checkpoint file {kind}", recipe, folder)
        assert f"checkpoint {last} is damaged" in said or file.name == "progress.json", said[-2000:]

    def file_limit(self, recipe: str) -> None:
        """A write beyond so many bytes fails, as it does under a quota."""
        run, folder = self.start(recipe, "quota")
        wait_for(lambda: checkpoints(folder), run)
        run.kill()
        good = checkpoints(folder)
        largest = max(path.stat().st_size for path in good[-1].iterdir())
        limit = self.random.randrange(20_000, largest)
        run = Run(recipe, self.words(recipe, folder), folder / "log", largest_file=limit)
        self.must_say_full(run, folder, good)
        self.resume("disk full (limit on a file's size)", recipe, folder)

    def small_disk(self, recipe: str) -> bool:
        """A tmpfs that fills while a checkpoint is written; needs root. Whether it could be tried."""
        folder = self.work / "disk"
        folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            return False
        try:
            run = Run(recipe, self.words(recipe, folder), self.work / "disk.log")
            wait_for(lambda: checkpoints(folder), run)
            run.kill()
            good = checkpoints(folder)
            shutil.rmtree(folder / "checkpoints" / f"step-{2 * EVERY:08d}.partial", ignore_errors=True)
            needed = sum(path.stat().st_size for path in good[-1].iterdir())
            room = self.random.randrange(needed // 10, needed)
            free = shutil.disk_usage(folder).free
            (folder / "ballast").write_bytes(b"\0" * (free - room))
            run = Run(recipe, self.words(recipe, folder), self.work / "disk.log")
            self.must_say_full(run, folder, good)
            (folder / "ballast").unlink()
            done = steps_done(folder)
            finish(recipe, self.words(recipe, folder), self.work / "disk.log")
            same = weights_of(recipe, folder) == self.whole[recipe]
            self.note("disk full (small tmpfs)", same, done - starts_of(folder)[-1])
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return True

    def must_say_full(self, run: Run, folder: Path, good: list[Path]) -> None:
        status, said = run.wait(), run.said()
        assert status == 1, f"a full disk ended the run with {status}:\n{said[-2000:]}"
        assert "could not be written" in said.splitlines()[-1] and "Traceback" not in said, said[-2000:]
        assert checkpoints(folder)[-1] >= good[-1], "the last good checkpoint is gone"
        assert not list(folder.glob("checkpoints/*.partial")), "a partial checkpoint was left"

    def two_ranks(self, recipe: str) -> None:
        """Two ranks under `accelerate launch --max_restarts 1`, which goes on by itself where one dies."""
        _, process = self.launch(recipe, "two-ranks")
        assert process.wait(240) == 0, "two undisturbed ranks"
        whole = weights_of(recipe, self.work / "two-ranks")

        folder, process = self.launch(recipe, "one-killed")
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        done = steps_done(folder)
        assert process.wait(240) == 0, (folder / "log").read_text()[-4000:]
        self.note(
            "one of two ranks killed", weights_of(recipe, folder) == whole, done - starts_of(folder)[-1]
        )

        # One rank alone gets the signal: both stop at the same step. The launcher restarts them by itself.
        folder, process = self.launch(recipe, "one-told")
        os.kill(rank_of(process.pid, 1), signal.SIGTERM)
        assert process.wait(240) == 0, (folder / "log").read_text()[-4000:]
        stopped = re.search(r"SIGTERM: stopped after step (\d+)", (folder / "log").read_text())
        assert stopped, "the run did not stop on the signal"
        lost = int(stopped[1]) - starts_of(folder)[-1]
        self.note("SIGTERM to one of two ranks", weights_of(recipe, folder) == whole, lost)

        # The launcher gets the signal: it forwards it to its ranks, waits for their checkpoint, and ends.
        folder, process = self.launch(recipe, "launcher-told")
        process.terminate()
        assert process.wait(60) != 0
        done = steps_done(folder)
        assert f"SIGTERM: stopped after step {done}" in (folder / "log").read_text()
        _, process = self.launch(recipe, "launcher-told", wait=False)
        assert process.wait(240) == 0, (folder / "log").read_text()[-4000:]
        same = weights_of(recipe, folder) == whole
        self.note("SIGTERM to the launcher of two ranks", same, done - starts_of(folder)[-1])

    def launch(self, recipe: str, name: str, wait: bool = True) -> tuple[Path, subprocess.Popen]:
        """Two ranks and their launcher, returned once the first checkpoint is written."""
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += ["configs/accelerate/cpu.yaml", "--max_restarts", "1", "--main_process_port", "0"]
        with (folder / "log").open("a") as log:
            process = subprocess.Popen(
                [*command, f"{recipe}.py", *self.words(recipe, folder)], cwd=ROOT, stdout=log, stderr=log
            )
        end = time.monotonic() + 120
        while wait and not (checkpoints(folder) and steps_done(folder) >= 3):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.002)
        return folder, process

    def slurm(self, recipe: str) -> None:
        """examples/slurm.sh, with a stand-in for Slurm that starts its command and records requeueing."""
        bin_folder, folder = self.work / "bin", self.work / "slurm"
        bin_folder.mkdir()
        folder.mkdir()
        stand_ins = {
            "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
            "scontrol": f'[[ $1 == show ]] && echo 127.0.0.1 || echo "$@" >> {folder}/scontrol',
            "accelerate": f'exec {sys.executable} -m accelerate.commands.launch "${{@:2}}"',
        }
        for name, line in stand_ins.items():
            (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
            (bin_folder / name).chmod(0o755)
        environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
        environment |= {"SLURM_JOB_NODELIST": "here", "SLURM_NODEID": "0", "SLURM_GPUS_ON_NODE": "1"}
        command = ["bash", "examples/slurm.sh", f"{recipe}.py", *self.words(recipe, folder)]
        done = 0
        for start in range(2):
            with (folder / "log").open("a") as log:
                process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
            if start == 0:
                end = time.monotonic() + 120
                while steps_done(folder) < 3:
                    assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                    time.sleep(0.002)
                process.send_signal(signal.SIGUSR1)
            assert process.wait(120) == 0, (folder / "log").read_text()[-4000:]
            assert (folder / "scontrol").read_text() == "requeue 42\n", "queued again once"
            done = steps_done(folder) if start == 0 else done
        same = weights_of(recipe, folder) == self.whole[recipe]
        self.note("Slurm's time is up (examples/slurm.sh)", same, done - starts_of(folder)[-1])

    # ---- The table -----------------------------------------------------------------------------------------

    def table(self) -> str:
        lines = ["| fault | tried | survived | steps lost, mean (most) |", "| --- | --- | --- | --- |"]
        for fault, (tried, survived, lost) in self.rows.items():
            lines.append(f"| {fault} | {tried} | {survived} | {np.mean(lost):.1f} ({max(lost)}) |")
        return "\n".join(lines)

    @property
    def all_survived(self) -> bool:
        return all(tried == survived for tried, survived, _ in self.rows.values())


def write_slices(folder: Path) -> Path:
    """Six subjects a class, of two 16-pixel slices each, and two more held out."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("AD", "NC")):
            place = folder / split / name
            place.mkdir(parents=True)
            for subject in range(count):
                for number in (1, 2):
                    pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
                    code = 1000 * (label + 1) + 500 * (split == "val") + subject
                    Image.fromarray(pixels).save(place / f"{code}_{number}.png")
    return folder


def rank_of(launcher: int, rank: int) -> int:
    """Process id of a rank below a launcher."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no rank {rank} below process {launcher}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--short", action="store_true", help="four kills, and no launcher")
    parser.add_argument("--kills", type=int, help="how many, half of them while a checkpoint is written")
    parser.add_argument("--seed", type=int, help="of the moments; default: a new one, which is printed")
    options = parser.parse_args()
    kills = options.kills or (4 if options.short else 20)
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)

    work = Path(tempfile.mkdtemp(prefix="adni_ldm_faults_"))
    os.environ.setdefault("HF_HOME", str(work / "cache"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    prepare_imports()
    both = ("train_ldm", "train_vae")
    try:
        faults = Faults(work, seed)
        for index in range(kills // 2):
            faults.kill_anywhere(both[index % 2])
            faults.kill_while_saving(both[index % 2])
        for recipe in both[: 1 if options.short else 2]:
            faults.signalled(recipe, signal.SIGTERM)
            faults.damaged(recipe, "truncated")
            faults.damaged(recipe, "bit flipped")
            faults.file_limit(recipe)
        faults.signalled("train_vae", signal.SIGUSR1)
        if not options.short:
            if not faults.small_disk("train_ldm"):
                print("no small disk: mounting a tmpfs needs root", flush=True)
            faults.two_ranks("train_ldm")
            faults.slurm("train_ldm")
        print(faults.table())
        print("all survived" if faults.all_survived else "NOT ALL SURVIVED")
        return 0 if faults.all_survived else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
