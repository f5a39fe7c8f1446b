"""Models from a folder or the Hub, refused in one line where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from torch import nn

from adni_ldm.errors import UserError
from adni_ldm.pipeline import ClassConditionalLDMPipeline

Model = TypeVar("Model")


def load_autoencoder(name: str) -> AutoencoderKL:
    """Autoencoder of one-channel slices, in float32 on the CPU; one of colour is folded to grey.

    Args:
        name: folder or Hub name of any diffusers AutoencoderKL, or of a pipeline with one in `vae/`.

    Raises:
        UserError: there is none, or it reads or writes neither one channel nor three.
    """

    def from_pretrained(name: str, **options) -> AutoencoderKL:
        try:
            return AutoencoderKL.from_pretrained(name, **options)
        except OSError as error:
            try:
                return AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
            except OSError:
                raise error from None

    vae = _load(from_pretrained, name, "an autoencoder", "train_vae.py")
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels == (3, 3):
        fold_to_grey(vae)
    elif channels != (1, 1):
        raise UserError(
            f"{name}: this autoencoder has {channels[0]} channels in, {channels[1]} out; not 1 or 3"
        )
    return vae


@torch.no_grad()
def fold_to_grey(vae: AutoencoderKL) -> None:
    """Make an autoencoder of colour one of grey slices, in place.

    A slice has the latent that it had as a grey picture, the same in all channels; what is decoded is the
    mean of the three channels. Both are linear, so the first kernels' sum and the last kernels' mean do it.
    """
    first, last = vae.encoder.conv_in, vae.decoder.conv_out  # weights (out, in, k, k)
    first.weight = nn.Parameter(first.weight.sum(dim=1, keepdim=True))
    last.weight = nn.Parameter(last.weight.mean(dim=0, keepdim=True))
    last.bias = nn.Parameter(last.bias.mean(dim=0, keepdim=True))
    first.in_channels = last.out_channels = 1
    vae.register_to_config(in_channels=1, out_channels=1)


def load_pipeline(name: str) -> ClassConditionalLDMPipeline:
    """Pipeline, in float32 on the CPU.

    Raises:
        UserError: there is none.
    """
    return _load(ClassConditionalLDMPipeline.from_pretrained, name, "a pipeline", "train_ldm.py")


def _load(from_pretrained: Callable[[str], Model], name: str, kind: str, recipe: str) -> Model:
    if not Path(name).exists() and _looks_local(name):
        raise UserError(f"{name}: no such folder; give {kind} that {recipe} wrote, or a Hub name ME/NAME")
    logging.disable_progress_bar()
    try:
        return from_pretrained(name, use_safetensors=True)  # a pickle runs code
    except (OSError, ValueError) as error:  # those of the Hub's client are OSErrors
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not {kind} that {recipe} wrote ({reason})") from error
    finally:
        logging.enable_progress_bar()


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here is a mistyped path: asking the Hub would take half a minute."""
    path = Path(name)
    return name.startswith((".", "~", "/", "runs/")) or name.count("/") != 1 or path.parent.is_dir()
