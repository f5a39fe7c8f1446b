"""Identity of a run, which a resume is compared with, and run.json, which records every start."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adni_ldm.data.manifest import CONTENT
from adni_ldm.data.provenance import DataRecord
from adni_ldm.data.slices import PREPARATION_VERSION, SliceTensors
from adni_ldm.environment import installed_versions
from adni_ldm.errors import UserError
from adni_ldm.files import read_json, write_json

LIBRARIES = ("adni-ldm", "torch", "diffusers", "accelerate", "transformers", "datasets", "safetensors")


def hash_slices(
    accelerator: Accelerator, data: DataRecord, image_size: int, **splits: SliceTensors
) -> dict[str, str]:
    """SHA-256 of what training sees of each split, first 16 hex digits. Every process calls it.

    If the data's manifest.json has a hash of the files' content, the hash is over that, the subjects of the
    split, the image size and the version of image preparation, and no pixel is read. Otherwise it is over the
    pixels. The same slices in the same order have the same hash wherever they are stored.
    """
    hashes = {}
    for split, slices in splits.items() if accelerator.is_main_process else ():
        digest = hashlib.sha256(slices.labels.numpy().tobytes())
        if data.hash_of == CONTENT:
            subjects = {name: sorted(scans) for name, scans in data.subjects[split].items()}
            parts = [data.hash, split, subjects, data.class_names, image_size, PREPARATION_VERSION]
            digest.update(json.dumps(parts, sort_keys=True).encode())
        else:
            for batch in slices.arrays.iter(batch_size=256):
                digest.update(batch["image"].tobytes())
        hashes[split] = digest.hexdigest()[:16]
    return broadcast_object_list([hashes])[0]


def hash_columns(*splits: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of the conditions {name: values} of each split, first 16 hex digits."""
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()[:16]


def run_identity(
    accelerator: Accelerator,
    settings: Mapping[str, Mapping[str, object]],
    data_hash: str,
    **hashes: str,
) -> dict[str, dict[str, object]]:
    """What a resumed run "must" and what it "should" share with its first part.

    `settings` are from `config.settings_to_keep`; `hashes` are of all but the data that the run starts from.
    """
    device = accelerator.device
    must = {
        "number of processes": accelerator.num_processes,
        "distribution": accelerator.distributed_type.value,
        "precision": accelerator.mixed_precision,
        "device": device.type,
        "data": data_hash[:16],
        **hashes,
        **settings["must"],
    }
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
    should = {
        "torch": torch.__version__,
        "GPU" if device.type == "cuda" else "number of threads": machine,
        **settings["should"],
    }
    return json.loads(json.dumps({"must": must, "should": should}))  # as a file returns it


def record_start(output_dir: str | Path, step: int, identity: Mapping[str, object]) -> None:
    """Add this start to `run.json`: command, versions, git commit, and identity of the run."""
    path = Path(output_dir) / "run.json"
    try:
        starts = json.loads(path.read_text())["starts"] if step else []
    except (OSError, ValueError, KeyError):
        starts = []
    start = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "git": git_commit(Path(__file__).parents[2]),
        "versions": installed_versions(LIBRARIES),
        **identity,
    }
    write_json(path, {"starts": [*starts, start]})


def record_finish(output_dir: str | Path, model: str) -> None:
    """Add to `run.json` that the run is finished; `model` is the file that its model is loaded by."""
    path = Path(output_dir) / "run.json"
    write_json(path, read_json(path) | {"finished": model})


def check_finished(output_dir: str | Path, identity: Mapping[str, Mapping[str, object]]) -> bool:
    """Whether the folder holds this run and its model, finished.

    Raises UserError if it holds a finished run of other settings.
    """
    try:
        record = read_json(Path(output_dir) / "run.json")
        earlier, model = record["starts"][-1]["must"], record["finished"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return False
    if not (Path(output_dir) / model).is_file():
        return False
    if differences := list_differences(earlier, identity["must"]):
        raise UserError(
            f"{output_dir} holds a finished run of other settings: {'; '.join(differences)}. "
            f"Choose another --output_dir; --init_from {output_dir} trains its model further"
        )
    return True


def list_differences(saved: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Name each setting that differs between two parts of a run; [] if one of them is not known."""
    names = sorted(saved.keys() | now.keys()) if saved and now else []
    return [
        f"{name} was {saved.get(name, 'absent')}, is {now.get(name, 'absent')}"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def git_commit(clone: Path) -> str | None:
    """Commit of a clone, with `+changes` if files differ from it; None outside a clone."""
    if not (clone / ".git").exists():
        return None
    describe = ["git", "-C", str(clone), "describe", "--always", "--exclude=*", "--abbrev=40"]
    try:
        return subprocess.run(
            [*describe, "--dirty=+changes"], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
