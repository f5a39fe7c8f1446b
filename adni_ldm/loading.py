"""Load autoencoders and pipelines from a folder or the Hub, with one-line errors."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging
from torch import nn

from adni_ldm import stable_diffusion
from adni_ldm.errors import UserError
from adni_ldm.models.components import check_component_folder, model_folder, read_json
from adni_ldm.models.slice_autoencoder import SliceAutoencoder
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.stable_diffusion import weights_files

Model = TypeVar("Model")


def load_autoencoder(name: str, revision: str | None = None, variant: str | None = None) -> SliceAutoencoder:
    """Load an autoencoder of one-channel slices, float32 on the CPU; an RGB autoencoder is converted to grey.

    `name` is a folder or Hub name of any diffusers AutoencoderKL, or of a pipeline with one in `vae/`, or a
    checkpoint of Stable Diffusion, .safetensors. Raises UserError if there is none, or it does not have one
    channel or three, in and out.
    """

    def from_pretrained(name: str, **options) -> SliceAutoencoder:
        if _is_single_file(name):
            return _of_slices(stable_diffusion.load_single_file(name)["vae"])
        # At the top of a repository or in vae/: no other weights.
        files = [f"{place}{file}" for place in ("", "vae/") for file in weights_files(variant)]
        root = model_folder(name, revision, ["README.md", *files])
        folder = root if (root / "config.json").is_file() else root / "vae"
        check_component_folder(folder, ("AutoencoderKL", "SliceAutoencoder"))
        options |= {"variant": variant, "torch_dtype": torch.float32}
        return SliceAutoencoder.from_pretrained(folder, **options)

    vae = _load(from_pretrained, name, "an autoencoder", "train_vae.py")
    return _to_grey(name, vae, revision)


def _to_grey(name: str, vae: SliceAutoencoder, revision: str | None) -> SliceAutoencoder:
    """The autoencoder of one-channel slices that `vae` is, or is folded to, with its latents' scale."""
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels == (3, 3):
        fold_to_grey(vae)
    elif channels != (vae.patch_size**2,) * 2:
        raise UserError(
            f"{name}: this autoencoder has {channels[0]} input and {channels[1]} output channels; not 1 or 3"
        )
    if vae.config.latents_mean is None and vae.config.scaling_factor != 1:  # of train_vae.py's it is 1
        keep_scale(vae)
        vae.register_to_config(_base_model=stable_diffusion.describe_base(name, revision))
    return vae


def keep_scale(vae: SliceAutoencoder) -> None:
    """Write the scale that an autoencoder of elsewhere was trained with as mean and SD of its latents.

    A U-Net that was trained on z' = (z − shift) · scaling_factor then has what it knows.
    """
    channels, config = vae.config.latent_channels, vae.config
    mean, std = config.get("shift_factor") or 0.0, 1 / config.scaling_factor
    vae.register_to_config(latents_mean=[mean] * channels, latents_std=[std] * channels)
    vae.register_to_config(scaling_factor=1.0, shift_factor=None)


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


def load_pipeline(name: str, **options) -> ClassConditionalLDMPipeline:
    """Load a pipeline, float32 on the CPU; `options` as of `from_pretrained`. UserError if there is none."""

    def from_pretrained(name: str, **safe) -> ClassConditionalLDMPipeline:
        return ClassConditionalLDMPipeline.from_pretrained(name, **safe, **options)

    return _load(from_pretrained, name, "a pipeline", "train_ldm.py")


def load_base(
    name: str,
    class_names: Sequence[str],
    class_prompts: Mapping[str, str] | None = None,
    tokens_per_class: int = 2,
    vae: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> ClassConditionalLDMPipeline:
    """Load what train_ldm.py fine-tunes: a pipeline of its own, or Stable Diffusion as one.

    `name` is a folder or Hub name, or a checkpoint of Stable Diffusion, .safetensors. Stable Diffusion's text
    encoder gives way to class tokens that start at its output for `class_prompts` (`class_tokens`); its
    autoencoder is converted to grey and keeps its scale, its noise schedule and prediction type stay.

    Args:
        class_names, class_prompts, tokens_per_class: of the class tokens; a pipeline of train_ldm.py has its
            own.
        vae: name of an autoencoder in place of the pipeline's, which is then not loaded.
        note: called with the prompts that the class tokens start at.

    Raises UserError if there is no such pipeline, it does not fit, or it cannot use `class_prompts`.
    """
    other = load_autoencoder(vae) if vae else None
    if not _is_single_file(name) and _is_own(_load(partial(_read_index, revision), name, *BASE)):
        if class_prompts:
            raise UserError(
                f"--class_prompts: {name} has class tokens that were trained, and no text encoder; omit them"
            )
        given = {"vae": other} if other else {}
        return load_pipeline(name, revision=revision, variant=variant, **given)

    def from_parts(name: str, **_) -> ClassConditionalLDMPipeline:
        if _is_single_file(name):
            parts = stable_diffusion.load_single_file(name)
            channels = parts["vae"].config.latent_channels
            parts["vae"] = other or _to_grey(name, _of_slices(parts["vae"]), None)
        else:
            folder = model_folder(name, revision, stable_diffusion.files(variant, without_vae=bool(other)))
            parts = stable_diffusion.load_parts(name, folder, variant)
            channels = AutoencoderKL.load_config(folder / "vae")["latent_channels"]
            parts["vae"] = other or load_autoencoder(name, revision, variant)
        unet, scheduler = parts["unet"], stable_diffusion.to_ddim(name, parts["scheduler"])
        stable_diffusion.check_unet(name, unet, channels)  # of its own latents, and not of another VAE's
        unet.register_to_config(_base_model=stable_diffusion.describe_base(name, revision))
        classes = (class_names, class_prompts or {}, tokens_per_class)
        tokens = stable_diffusion.class_tokens(name, parts, *classes, note)
        return ClassConditionalLDMPipeline(parts["vae"], unet, tokens, scheduler)

    return _load(from_parts, name, *BASE)


BASE = ("a pipeline", "train_ldm.py or Stable Diffusion")


def _is_single_file(name: str) -> bool:
    return name.endswith(".safetensors") and Path(name).is_file()


def _read_index(revision: str | None, name: str, **_) -> Mapping:
    """model_index.json, before gigabytes are downloaded. Raises UserError if the pipeline does not fit."""
    index = read_json(model_folder(name, revision, ["model_index.json"]) / "model_index.json")
    if not _is_own(index):
        stable_diffusion.check_parts(name, index)
    return index


def _is_own(index: Mapping) -> bool:
    return "ClassConditionalLDMPipeline" in str(index.get("_class_name"))


def _of_slices(vae: AutoencoderKL) -> SliceAutoencoder:
    """The same autoencoder, of our class; the weights are not copied."""
    sliced = SliceAutoencoder.from_config(vae.config)
    sliced.load_state_dict(vae.state_dict(), assign=True)
    return sliced.eval()


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
        raise UserError(f"{name}: not {kind} of {recipe} ({reason})") from error
    finally:
        logging.enable_progress_bar()


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist here is a mistyped path: asking the Hub takes half a minute."""
    path = Path(name)
    return name.startswith((".", "~", "/", "runs/")) or name.count("/") != 1 or path.parent.is_dir()
