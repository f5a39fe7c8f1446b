"""Which classes, and which weights, a model's folder may name.

`model_index.json` names a module and a class for each component, and some versions of diffusers import any
module that is named there, which runs its code. A folder is therefore checked before diffusers reads it.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
from diffusers import SchedulerMixin
from huggingface_hub import snapshot_download

from adni_ldm.errors import UserError

ADMITTED = {
    "diffusers": ("AutoencoderKL", "UNet2DConditionModel"),  # and its schedulers
    "transformers": ("CLIPTextModel", "CLIPTokenizer"),  # what a text-to-image model is conditioned by
    "slice_autoencoder": ("SliceAutoencoder",),  # ours, as pipeline.py names them
    "class_embedding": ("ClassEmbedding",),
    "condition_embedding": ("ConditionEmbedding",),
    "linear_calibration": ("LinearCalibration",),
}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # of text-to-image models; never loaded


def model_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of that name, or that of the Hub with the files of these patterns."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def check_model_folder(folder: Path) -> dict[str, tuple[str, str]]:
    """Check that a pipeline's folder names no class but those of `ADMITTED` and no weights but safetensors.

    Returns {component: (library, class)} of `model_index.json`, without those that are null or `LEFT_OUT`.
    Raises UserError that names what is not admitted, or a file that is not JSON.
    """
    index_path = folder / "model_index.json"
    components = {}
    for name, value in read_json(index_path).items():
        if name.startswith("_") or not isinstance(value, list) or name in LEFT_OUT or value == [None, None]:
            continue  # settings, and what is not loaded
        if not name.isidentifier() or len(value) != 2 or not _is_admitted(*value):
            shown = json.dumps({name: value})[:200]
            raise UserError(
                f"{index_path}: {shown} is not among the classes that are loaded from a model: diffusers' "
                "AutoencoderKL, UNet2DConditionModel and schedulers, transformers' CLIPTextModel and "
                "CLIPTokenizer, and those of this package"
            )
        components[name] = tuple(value)
    for name in components:
        check_component_folder(folder / name)
    return components


def check_component_folder(folder: Path, classes: tuple[str, ...] = ()) -> None:
    """Check that a component's folder has no files that make a library load anything but its safetensors.

    Refused are configs that name another class than `classes` (any, if none are given) or a quantization,
    whose library would be imported; adapters, which name another model; and indices of shards with other file
    names.
    Raises UserError that names file and value.
    """
    config_path = folder / "config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    named = config.get("_class_name")
    if classes and named is not None and named not in classes:
        raise UserError(f"{config_path}: _class_name {str(named)[:100]!r} is not {' or '.join(classes)}")
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{config_path}: quantized weights are not loaded; save the model without quantization"
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder / 'adapter_config.json'}: adapters are not loaded; merge them into the weights"
        )
    for path in sorted(folder.glob("*.index.json")):
        shards = read_json(path).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
                raise UserError(f"{path}: {str(shard)[:100]!r} is not a .safetensors file of this folder")


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file holds none, OSError if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object is expected, not a {type(content).__name__}")
    return content


def _is_admitted(library: object, name: object) -> bool:
    if not (isinstance(library, str) and isinstance(name, str)):
        return False
    if library == "diffusers" and name.endswith("Scheduler"):
        found = getattr(diffusers, name, None)
        return isinstance(found, type) and issubclass(found, SchedulerMixin)
    return name in ADMITTED.get(library, ())
