"""Models from a folder or the Hub, refused in one line where there are none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from diffusers import AutoencoderKL
from diffusers.utils import logging

from adni_ldm.errors import UserError
from adni_ldm.pipeline import ClassConditionalLDMPipeline

Model = TypeVar("Model")


def load_autoencoder(name: str) -> AutoencoderKL:
    """Autoencoder of one-channel slices, in float32 on the CPU.

    Raises:
        UserError: there is none, or it reads colour.
    """
    vae = _load(AutoencoderKL.from_pretrained, name, "an autoencoder", "train_vae.py")
    if vae.config.in_channels != 1:
        raise UserError(f"{name}: this autoencoder reads {vae.config.in_channels} channels, slices have 1")
    return vae


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
