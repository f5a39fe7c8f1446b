"""Speed and memory of prepare_data.py scans: a table.

    python benchmarks/scans.py [--volumes 40] [--registered 6]

Volumes of 256 x 256 x 170 voxels of 1 mm (int16, .nii.gz, with noise in the background) are made from the
template in a temporary folder. The command runs with 2 workers. Memory is the sum of the resident memory of
its processes, so shared pages count more than once. CPU seconds are of all processes, and hardly depend on
the load.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from adni_ldm.preprocessing.phantom_atlas import load_atlas  # noqa: E402

SHAPE = (170, 256, 256)
DIFFERENT = 4  # volumes; the others are links to them
WORKERS = 2


def make_head(seed: int) -> nibabel.Nifti1Image:
    """The template with skull and scalp, slightly rotated and shifted, with noise."""
    atlas, rng = load_atlas(), np.random.default_rng(seed)
    tilt, shift = rng.normal(0, 0.1), rng.normal(0, 8, 3)
    turn = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    middle = np.array([0, -17, 4]) - atlas.origin_mm
    offset = middle - turn @ (np.array(SHAPE) / 2 + shift)
    head = ndimage.affine_transform(atlas.intensity, turn, offset, SHAPE, order=1) * 700
    brain = ndimage.affine_transform(atlas.brain, turn, offset, SHAPE, order=1) > 0.5
    outside = ndimage.distance_transform_edt(~brain)
    head += 60 * ((outside > 0) & (outside < 8)) + 800 * ((outside >= 8) & (outside < 14))
    noisy = np.hypot(head + rng.normal(0, 12, SHAPE), rng.normal(0, 12, SHAPE))
    return nibabel.Nifti1Image(noisy.astype(np.int16), np.diag([1.0, 1.0, 1.0, 1.0]))


def write_study(folder: Path, volumes: int) -> None:
    """Write scans/ and table.csv of so many subjects."""
    (folder / "scans").mkdir()
    lines = ["path,subject,group,age,sex"]
    for number in range(volumes):
        path = folder / "scans" / f"{number:03d}.nii.gz"
        if number < DIFFERENT:
            nibabel.save(make_head(number), path)
        else:
            os.link(folder / "scans" / f"{number % DIFFERENT:03d}.nii.gz", path)
        lines.append(f"{path.name},{number:03d},{'AD' if number % 2 else 'CN'},70,F")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")


def resident_mb(pid: int) -> float:
    """Resident memory of a process and its descendants, MB."""
    parents, sizes = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        parents[int(folder.name)], sizes[int(folder.name)] = int(fields[1]), int(fields[21]) * 4096 / 1e6
    family = [pid]
    for parent in family:
        family += [child for child, of in parents.items() if of == parent]
    return sum(sizes.get(one, 0) for one in family)


def measure(folder: Path, name: str, *flags: str) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak MB of the command."""
    before = cpu_seconds()
    arguments = [
        "--input_dir",
        folder / "scans",
        "--table",
        folder / "table.csv",
        "--output_dir",
        folder / name,
    ]
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, ROOT / "prepare_data.py", "scans", *arguments, *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    output: list[str] = []
    reader = threading.Thread(target=lambda: output.append(process.stderr.read()))
    reader.start()
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, resident_mb(process.pid))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise SystemExit(output[0][-2000:])
    return time.monotonic() - started, cpu_seconds() - before, peak


def cpu_seconds() -> float:
    """CPU time of all child processes that have ended, s."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=40, help="Volumes converted without registration.")
    parser.add_argument("--registered", type=int, default=8, help="Volumes registered.")
    cfg = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="scans_benchmark_") as place:
        plain, registered = Path(place) / "plain", Path(place) / "registered"
        for folder, volumes in ((plain, cfg.volumes), (registered, cfg.registered)):
            folder.mkdir()
            write_study(folder, volumes)
        workers = ("--workers", str(WORKERS))
        seconds, cpu, memory = measure(plain, "out", *workers)
        rows.append(("volumes per second, start to manifest", f"{cfg.volumes / seconds:.2f}", "at least 2"))
        rows.append(("CPU seconds per volume", f"{cpu / cfg.volumes:.2f}", ""))
        rows.append(("memory, MB", f"{memory:.0f}", "at most 1500"))
        seconds, cpu, memory = measure(
            registered, "out", "--register", "mni", "--brain_mask", "mni", *workers
        )
        wall = seconds * WORKERS / cfg.registered
        rows.append(("registered: seconds per volume and core", f"{wall:.1f}", "at most 25"))
        rows.append(("registered: CPU seconds per volume", f"{cpu / cfg.registered:.1f}", ""))
        rows.append(("registered: memory, MB", f"{memory:.0f}", ""))

    print(f"256 x 256 x 170 voxels, 20 slices of 256 x 256, {WORKERS} workers")
    print(
        f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}"
    )
    print()
    for name, value, target in (("", "measured", "target"), *rows):
        print(f"{name:42}  {value:>9}  {target}".rstrip())


if __name__ == "__main__":
    main()
