"""Load autoencoders and pipelines from a folder or the Hub, with one-line errors."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.models.components import check_component_folder
from adni_ldm.models.slice_autoencoder import SliceAutoencoder
from adni_ldm.pipeline import ClassConditionalLDMPipeline

Model = TypeVar("Model")
WEIGHTS = "diffusion_pytorch_model"
# What an autoencoder is loaded from, at the top of a repository or in vae/: no other weights, no variants.
VAE_FILES = [
    f"{place}{name}"
    for place in ("", "vae/")
    for name in (
        "config.json",
        f"{WEIGHTS}.safetensors",
        f"{WEIGHTS}-*.safetensors",
        f"{WEIGHTS}.*.index.json",
    )
]


def load_autoencoder(name: str) -> SliceAutoencoder:
    """Load an autoencoder of one-channel slices, float32 on the CPU; an RGB autoencoder is converted to grey.

    `name` is a folder or Hub name of any diffusers AutoencoderKL, or of a pipeline with one in `vae/`. Raises
    UserError if there is none, or it does not have one channel or three, in and out.
    """

    def from_pretrained(name: str, **options) -> SliceAutoencoder:
        root = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=VAE_FILES))
        folder = root if (root / "config.json").is_file() else root / "vae"
        check_component_folder(folder, ("AutoencoderKL", "SliceAutoencoder"))
        return SliceAutoencoder.from_pretrained(folder, **options)

    vae = _load(from_pretrained, name, "an autoencoder", "train_vae.py")
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels == (3, 3):
        fold_to_grey(vae)
    elif channels != (vae.patch_size**2,) * 2:
        raise UserError(
            f"{name}: this autoencoder has {channels[0]} input and {channels[1]} output channels; not 1 or 3"
        )
    return vae


@torch.no_grad()
def fold_to_grey(vae: SliceAutoencoder) -> None:
    """Convert an RGB autoencoder to grey slices, in place.

    A slice has the latent of the RGB image with the slice in each channel, and is decoded to the mean of the
    three channels. Both are linear: the first kernels are summed, the last ones averaged.
    """
    first, last = vae.encoder.conv_in, vae.decoder.conv_out  # weights (out, in, k, k)
    first.weight = nn.Parameter(first.weight.sum(dim=1, keepdim=True))
    last.weight = nn.Parameter(last.weight.mean(dim=0, keepdim=True))
    last.bias = nn.Parameter(last.bias.mean(dim=0, keepdim=True))
    first.in_channels = last.out_channels = 1
    vae.register_to_config(in_channels=1, out_channels=1)


def load_pipeline(name: str) -> ClassConditionalLDMPipeline:
    """Load a pipeline, float32 on the CPU. Raises UserError if there is none."""
    return _load(ClassConditionalLDMPipeline.from_pretrained, name, "a pipeline", "train_ldm.py")


def _load(from_pretrained: Callable[[str], Model], name: str, kind: str, recipe: str) -> Model:
    if not Path(name).exists() and _looks_local(name):
        raise UserError(f"{name}: no such folder; give {kind} of {recipe}, or a Hub name USER/NAME")
    logging.disable_progress_bar()
    try:
        return from_pretrained(name, use_safetensors=True)  # a pickle runs code
    except UserError:
        raise
    except Exception as error:  # of a damaged folder, diffusers raises nearly any
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not {kind} that {recipe} wrote ({reason})") from error
    finally:
        logging.enable_progress_bar()


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here is a mistyped path: asking the Hub takes half a minute."""
    path = Path(name)
    return name.startswith((".", "~", "/", "runs/")) or name.count("/") != 1 or path.parent.is_dir()
