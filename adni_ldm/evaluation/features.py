"""Feature vectors of slices, in which distributions are compared.

Metrics of different features are not comparable, so every extractor carries the hash of its weights.
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
from adni_ldm.models.components import check_component_folder, model_folder
from adni_ldm.pipeline import normalize_latents

# Of a vision model on the Hub: no pickles, and no code.
VISION_FILES = ["config.json", "preprocessor_config.json", "model*.safetensors", "model*.index.json"]


@dataclass(frozen=True)
class Extractor:
    """A network from 8-bit slices (B, 1, H, W) to features (B, D), with the hash of its weights."""

    name: str
    hash: str
    network: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: ImageSet, batch_size: int = 64) -> np.ndarray:
        """Features (N, D), float32; computed in float32, regardless of the caller's autocast."""
        starts = tqdm(range(0, len(images), batch_size), desc=f"Features ({self.name})", leave=False)
        with torch.autocast(self.device.type, enabled=False):
            features = [self.network(images.images[first : first + batch_size]).cpu() for first in starts]
        return torch.cat(features).float().numpy()


def load_extractor(
    name: str,
    *,
    classifier: nn.Module | None = None,
    vae: AutoencoderKL | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """The extractor that `--features` names.

    Args:
        name: "classifier" (the penultimate layer of `classifier`), "vae" (the normalized mean latents of
            `vae`, pooled to 8 x 8 at most), "inception" (the 2048 features of the usual FID, Heusel et al.
            2017) or a vision model of transformers: a folder, or a Hub name such as facebook/dinov2-small.
        classifier: as `train_classifier` returns it, on `device`.
        vae: the autoencoder of the model that generated the samples.

    Raises:
        UserError: the name is none of these, or a model that it needs is missing.
    """
    device = torch.device(device)
    if name == "classifier":
        if classifier is None:
            raise UserError("--features classifier: no classifier; it needs real slices of two classes")
        penultimate = nn.Sequential(*list(classifier.children())[:-1], nn.Flatten())
        digest = hash_weights(classifier)
        return Extractor(name, digest, lambda images: penultimate(to_float(images.to(device))), device)
    if name == "vae":
        if vae is None:
            raise UserError("--features vae: give --model, the pipeline whose VAE is to be used")
        return Extractor(name, hash_weights(vae), lambda images: _latents(vae, images), vae.device)
    if name == "inception":
        network = _load_inception().to(device)
        digest = hash_weights(network)
        return Extractor(name, digest, lambda images: network(_rgb(images).to(device))[0], device)
    return _load_vision_model(name, device)


def _rgb(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W), of (B, 1, H, W): networks for photographs read three channels."""
    return images.expand(-1, 3, -1, -1)


def _latents(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    mean = vae.encode(to_float(images.to(vae.device))).latent_dist.mean
    latents = normalize_latents(vae, mean)  # (B, C, h, w)
    return F.adaptive_avg_pool2d(latents, min(8, latents.shape[-1])).flatten(1)


def _load_inception() -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except ImportError as error:
        reason, remedy = "torch-fidelity is not installed", "pip install torch-fidelity"
        cause = error
    except OSError as error:
        reason, remedy = "its weights could not be downloaded", "run it once with a network connection"
        cause = error
    raise UserError(
        f"--features inception: {reason}; {remedy}, or choose classifier, which works offline"
    ) from cause


def _load_vision_model(name: str, device: torch.device) -> Extractor:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        folder = model_folder(name, None, VISION_FILES)
        check_component_folder(folder)
        model, report = AutoModel.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
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
        raise UserError(f"--features {name}: this model reads {model.main_input_name}, not images alone")
    random = [key for key in report["missing_keys"] if "pooler" not in key]
    if random:
        raise UserError(f"--features {name}: no weights for {random[0]}, so its features would be random")
    if report["missing_keys"]:
        model.pooler = None  # its weights would be random, and so would the hash

    def network(images: torch.Tensor) -> torch.Tensor:
        pixels = processor(list(_rgb(images)), return_tensors="pt")["pixel_values"]
        output = model(pixels.to(device))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = output.last_hidden_state[:, 0]  # the [CLS] token
        return pooled.flatten(1)

    return Extractor(name, hash_weights(model), network, device)
