"""One place for what every test relies on: no network, own caches, one thread, small folders of slices.

The environment is set before datasets, torch or matplotlib are imported, and the recipes that tests start as
processes inherit it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the cache of the process that started them
    _CACHE = tempfile.mkdtemp(prefix="adni_ldm_tests_")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ.update(
        HF_HOME=_CACHE,
        HF_DATASETS_CACHE=os.path.join(_CACHE, "datasets"),
        HF_HUB_CACHE=os.path.join(_CACHE, "hub"),
        HF_HUB_OFFLINE="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        MPLBACKEND="Agg",
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="false",
    )

from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: E402
from contextlib import AbstractContextManager, contextmanager, suppress  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from stand_ins import blob_image, make_pipeline  # noqa: E402

from adni_ldm.output_lock import OutputLock  # noqa: E402

torch.set_num_threads(1)


def write_ad_nc(
    folder: Path,
    subjects: Mapping[str, Sequence[str]],
    slices: Sequence[int] = (78, 79),
    suffix: str = ".jpeg",
) -> Path:
    """A folder like the preprocessed ADNI set: {"train/AD": ["1001"]} becomes train/AD/1001_78.jpeg ..."""
    for place, names in subjects.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for name in names:
            for number in slices:
                blob_image((int(name), number)).save(folder / place / f"{name}_{number}{suffix}")
    return folder


@pytest.fixture
def held_by_another() -> Callable[..., AbstractContextManager[int]]:
    """A process, by its id, that holds an output folder; with `fork`, it has a fork that outlives it."""

    @contextmanager
    def hold(folder: Path, fork: bool = False) -> Iterator[int]:
        ready, forked = os.pipe(), 0
        holder = os.fork()
        if holder == 0:
            OutputLock(folder)
            forked = os.fork() if fork else 0
            if forked or not fork:
                os.write(ready[1], f"{forked:<20}".encode())
            signal.pause()
        try:
            forked = int(os.read(ready[0], 20))
            yield holder
        finally:
            for process in filter(None, (holder, forked)):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(holder, 0)

    return hold


@pytest.fixture
def ad_nc_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a small AD_NC folder, of 4 subjects a class in train and 2 in test, or of those given."""
    usual = {
        "train/AD": ["1001", "1002", "1003", "1004"],
        "train/NC": ["2001", "2002", "2003", "2004"],
        "test/AD": ["3001", "3002"],
        "test/NC": ["4001", "4002"],
    }

    def make(subjects: Mapping[str, Sequence[str]] | None = None, name: str = "AD_NC", **options) -> Path:
        return write_ad_nc(tmp_path / name, usual if subjects is None else subjects, **options)

    return make


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 12 synthetic subjects, 3 slices each, at 32 px. Not to be written to."""
    from adni_ldm.preprocessing.phantom import write_phantom_cohort

    folder = tmp_path_factory.mktemp("phantom") / "cohort"
    write_phantom_cohort(folder, subjects=12, slices=3, image_size=32, seed=0, workers=1)
    return folder


@pytest.fixture
def run(monkeypatch):
    """Run a recipe in this process by its command line."""
    from accelerate.state import AcceleratorState

    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(recipe, *words):
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, words)])
        recipe.main()

    yield run
    AcceleratorState._reset_state(True)
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def pipeline():
    """A pipeline with random weights that samples 16 x 16 pixels in milliseconds."""
    return make_pipeline()
