"""What is fuzzed: for each format valid inputs, and how our code reads one from a folder.

`seeds(name, folder)` returns a list of valid inputs, and `reader(name, folder)` a function of the bytes of an
input. A reader raises one of REFUSALS for what it refuses.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import nibabel  # noqa: E402
import numpy as np  # noqa: E402
from stand_ins import blob_image, make_pipeline  # noqa: E402

from adni_ldm.config import SampleConfig, TrainLDMConfig, TrainVAEConfig, parse_config  # noqa: E402
from adni_ldm.data.archives import open_data_dir  # noqa: E402
from adni_ldm.data.folder import list_folder  # noqa: E402
from adni_ldm.data.slices import prepare_image, read_image  # noqa: E402
from adni_ldm.data.study_table import classify, index_by_image, read_table  # noqa: E402
from adni_ldm.errors import UserError  # noqa: E402
from adni_ldm.evaluation.history import sampled_with  # noqa: E402
from adni_ldm.evaluation.image_sets import read_sample_table  # noqa: E402
from adni_ldm.loading import load_autoencoder, load_pipeline  # noqa: E402
from adni_ldm.models import ConditionalDenoiser, build_autoencoder  # noqa: E402
from adni_ldm.pipeline import ClassConditionalLDMPipeline  # noqa: E402
from adni_ldm.preprocessing.volumes import VolumeError, read_volume  # noqa: E402
from adni_ldm.training.finetuning import add_lora, save_lora  # noqa: E402
from adni_ldm.web.uploads import read_upload  # noqa: E402

FORMATS = ("NIfTI", "DICOM", "zip", "PNG", "JPEG", "CSV", "YAML", "safetensors", "model_index")
REFUSALS = (UserError, VolumeError)
SIDE = 24  # voxels of the scans
TEXT = ("CSV", "YAML", "model_index")
WEIGHTS, LORA = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"


def scan() -> nibabel.Nifti1Image:
    """A scan of 24³ voxels of 6 mm, the smallest that is accepted."""
    voxels = np.random.default_rng(0).integers(0, 1000, (SIDE,) * 3).astype(np.int16)
    return nibabel.Nifti1Image(voxels, np.diag([6.0, 6.0, 6.0, 1.0]))


def image_bytes(kind: str, mode: str) -> bytes:
    """A small image file of a mode of PIL's."""
    content = io.BytesIO()
    blob_image((0, 1), 64, 60).convert(mode).save(content, kind)
    return content.getvalue()


STUDY = """Image Data ID,Subject,Group,Sex,Age,Visit,Modality
I218391,002_S_0001,AD,F,71.5,sc,MRI
I218392,002_S_0002,CN,M,"68",m06,MRI
I218393,002_S_0003,MCI,,,bl,PET
"""
METADATA = """file_name,subject,image_id,slice,label,seed,model,model_hash,data_hash
AD/1_1.png,007,I1,1,AD,0,runs/ldm,abc,def
NC/2_1.png,"0,08",I2,2,NC,1,runs/ldm,abc,def
"""
SAMPLE = """model: runs/ldm
class: all
num_images: 64
guidance_scale: 1.5
"""
SETTINGS = (TrainVAEConfig, TrainLDMConfig, SampleConfig)
CONFIGS = (
    "model_index.json",
    "vae/config.json",
    "unet/config.json",
    "class_embedding/config.json",
    "scheduler/scheduler_config.json",
)


def seeds(name: str, folder: Path) -> list[bytes]:
    """Valid inputs of a format."""
    if name == "NIfTI":
        image = scan()
        second = nibabel.Nifti2Image(np.asarray(image.dataobj, np.float32), image.affine)
        return [image.to_bytes(), second.to_bytes(), gzip.compress(image.to_bytes(), 1)]
    if name == "DICOM":
        from volume_files import write_dicom

        return [sorted(write_dicom(scan(), folder / "series").iterdir())[5].read_bytes()]
    if name == "zip":
        packed = []
        for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w", method) as archive:
                for place in ("train/AD/1_1.png", "train/NC/2_1.png"):
                    archive.writestr(place, image_bytes("PNG", "L"))
                archive.writestr("train/metadata.csv", METADATA)
            packed.append(content.getvalue())
        return packed
    if name in ("PNG", "JPEG"):
        modes = ("L", "RGB", "P", "LA", "I;16") if name == "PNG" else ("L", "RGB", "CMYK")
        return [image_bytes(name, mode) for mode in modes]
    if name == "CSV":
        return [STUDY.encode(), METADATA.encode()]
    if name == "YAML":
        recipes = [(ROOT / f"configs/adni/{recipe}.yaml").read_bytes() for recipe in ("vae", "ldm")]
        return [*recipes, SAMPLE.encode()]
    model = make_pipeline()
    model.save_pretrained(folder / "model")
    if name == "model_index":
        return [(folder / "model" / place).read_bytes() for place in CONFIGS]
    denoiser = ConditionalDenoiser(model.unet, model.class_embedding)
    add_lora(model.unet, 1)
    save_lora(denoiser, folder / "lora")
    build_autoencoder(16, widths=(4, 4), latent_channels=1).save_pretrained(folder / "vae")
    return [(folder / "vae" / WEIGHTS).read_bytes(), (folder / "lora" / LORA).read_bytes()]


def zip_of_names(change: Callable[[bytes], bytes]) -> bytes:
    """A valid zip, the names and contents of whose members are changed."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for place in ("train/AD/1_1.png", "train/../NC/2_1.png", "train/metadata.csv"):
            name = change(place.encode()).decode("utf-8", "replace").replace("\0", "")[:60000]
            archive.writestr(name or "x", change(METADATA.encode()))
    return content.getvalue()


def repair_png(content: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, which refuse nearly any change."""
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big") if end < len(data) else b""
        at = end + 4
    return bytes(data)


def reader(name: str, folder: Path) -> Callable[[bytes, int], None]:
    """Return a function of an input and the number of the seed that it was made from."""
    read = {
        "NIfTI": _read_nifti,
        "DICOM": _read_dicom,
        "zip": _read_zip,
        "PNG": _read_image,
        "JPEG": _read_image,
        "CSV": _read_csv,
        "YAML": _read_yaml,
        "safetensors": _read_safetensors,
        "model_index": _read_model,
    }[name]
    return lambda content, seed: read(folder, content, seed)


def _put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _read_nifti(folder: Path, content: bytes, seed: int) -> None:
    read_volume(_put(folder / "scan.nii", content) if seed < 2 else _put(folder / "scan.nii.gz", content))
    if seed == 0:  # the same header before what is compressed
        read_volume(_put(folder / "scan.nii.gz", gzip.compress(content, 1)))


def _read_dicom(folder: Path, content: bytes, seed: int) -> None:
    _put(sorted((folder / "series").iterdir())[5], content)
    read_volume(folder / "series")


def _read_zip(folder: Path, content: bytes, seed: int) -> None:
    unpacked = open_data_dir(_put(folder / "set.zip", content))
    try:
        list_folder(unpacked, ("AD", "NC"))
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _read_image(folder: Path, content: bytes, seed: int) -> None:
    path = _put(folder / "1_1.png", content)
    prepare_image(read_image(path), 64)
    read_upload(path, 64)


def _read_csv(folder: Path, content: bytes, seed: int) -> None:
    if seed == 0:
        rows = read_table(_put(folder / "study.csv", content))
        classify(rows, ("AD", "NC"))
        if "image_id" in rows:
            index_by_image(rows, "study.csv")
        return
    for place in ("train/AD/1_1.png", "train/NC/2_1.png"):
        if not (folder / place).exists():
            _put(folder / place, image_bytes("PNG", "L"))
    _put(folder / "train/metadata.csv", content)
    sampled_with(read_sample_table(folder / "train"))
    list_folder(folder, ("AD", "NC")).raise_problems()


def _read_yaml(folder: Path, content: bytes, seed: int) -> None:
    path, complaint = _put(folder / "settings.yaml", content), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parse_config(SETTINGS[seed], "", ["--config", str(path)])
    except SystemExit as error:  # argparse prints its usage
        raise UserError(complaint.getvalue()) from error


def _read_safetensors(folder: Path, content: bytes, seed: int) -> None:
    if seed == 0:
        _put(folder / "vae" / WEIGHTS, content)
        load_autoencoder(str(folder / "vae"))
        return
    _put(folder / "lora" / LORA, content)
    model = _model(folder)
    try:
        model.load_lora_weights(folder / "lora")
    except ValueError as error:  # what this function of the library is said to raise
        raise UserError(str(error)) from error
    finally:
        model.unload_lora_weights()


@functools.cache
def _model(folder: Path) -> ClassConditionalLDMPipeline:
    return load_pipeline(str(folder / "model"))


def _read_model(folder: Path, content: bytes, seed: int) -> None:
    kept = (folder / "model" / CONFIGS[seed]).with_suffix(".kept")
    path = folder / "model" / CONFIGS[seed]
    if not kept.exists():
        path.rename(kept)
    try:
        path.write_bytes(content)
        load_autoencoder(str(folder / "model")) if seed == 1 else load_pipeline(str(folder / "model"))
    finally:
        shutil.copyfile(kept, path)
