"""Slices to feature vectors, in which distributions are compared.

Figures of different features must never be compared: every extractor carries the hash of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel
from transformers.utils import logging

from adni_ldm.data.slices import to_float
from adni_ldm.errors import UserError
from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.generation import hash_weights
from adni_ldm.pipeline import normalize_latents


@dataclass(frozen=True)
class Extractor:
    """`network` makes features (B, D) of 8-bit slices (B, 1, H, W); `hash` tells which weights do it."""

    name: str
    hash: str
    network: Callable[[torch.Tensor], torch.Tensor]

    @torch.no_grad()
    def __call__(self, images: ImageSet, batch_size: int = 64) -> np.ndarray:
        """Features (N, D), float32, of each slice by itself."""
        starts = tqdm(range(0, len(images), batch_size), desc=f"Features ({self.name})", leave=False)
        features = [self.network(images.images[first : first + batch_size]).float().cpu() for first in starts]
        return torch.cat(features).numpy()


def load_extractor(
    name: str,
    *,
    classifier: nn.Module | None = None,
    vae: AutoencoderKL | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """The extractor that `--features` names.

    Args:
        name: "classifier" (what `classifier` passes to its last layer), "vae" (the mean latents of `vae`,
            normalized and pooled to 8 x 8 at most), "inception" (the 2048 features of the usual FID, Heusel
            et al. 2017) or a vision model for transformers: a folder, or a Hub name such as
            facebook/dinov2-small.
        classifier: as `train_classifier` returns it, on `device`.
        vae: the autoencoder of the model that drew the samples.

    Raises:
        UserError: the name is none of these, or what it needs is not here.
    """
    if name == "classifier":
        if classifier is None:
            raise UserError(
                "--features classifier: there is no classifier; it needs real slices of two classes"
            )
        penultimate = nn.Sequential(*list(classifier.children())[:-1], nn.Flatten())
        return Extractor(
            name, hash_weights(classifier), lambda images: penultimate(to_float(images.to(device)))
        )
    if name == "vae":
        if vae is None:
            raise UserError("--features vae: give --model, the folder of the model whose VAE is to be used")
        return Extractor(
            name, hash_weights(vae), lambda images: _latents(vae, to_float(images.to(vae.device)))
        )
    if name == "inception":
        network = _load_inception().to(device)
        return Extractor(name, hash_weights(network), lambda images: network(_colours(images).to(device))[0])
    return _load_vision_model(name, device)


def _colours(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W), of (B, 1, H, W): networks for photographs read three channels."""
    return images.expand(-1, 3, -1, -1)


def _latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    latents = normalize_latents(vae, vae.encode(images).latent_dist.mean)  # (B, C, h, w)
    return F.adaptive_avg_pool2d(latents, min(8, latents.shape[-1])).flatten(1)


def _load_inception() -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except ImportError as error:
        reason, remedy = "torch-fidelity is not installed", "pip install torch-fidelity"
        cause = error
    except OSError as error:
        reason, remedy = "its weights could not be fetched", "run it once where there is a network"
        cause = error
    raise UserError(
        f"--features inception: {reason}; {remedy}, or choose classifier, which works offline"
    ) from cause


def _load_vision_model(name: str, device: str | torch.device) -> Extractor:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = AutoModel.from_pretrained(name, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--features {name}: not classifier, vae, inception or a vision model for transformers ({reason})"
        ) from error
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
    model = model.to(device).eval()
    if model.main_input_name != "pixel_values":
        raise UserError(f"--features {name}: this model reads {model.main_input_name}, not pictures alone")
    random = [key for key in report["missing_keys"] if "pooler" not in key]
    if random:
        raise UserError(f"--features {name}: no weights for {random[0]}, so its features would be random")
    if report["missing_keys"]:
        model.pooler = None  # or it would be random, and so would the hash

    def network(images: torch.Tensor) -> torch.Tensor:
        pixels = processor(list(_colours(images)), return_tensors="pt")["pixel_values"]
        output = model(pixels.to(device))
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state[:, 0] if pooled is None else pooled).flatten(
            1
        )  # else the class token

    return Extractor(name, hash_weights(model), network)
