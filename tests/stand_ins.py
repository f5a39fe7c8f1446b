"""Stand-ins for a slice and for a trained model, where their content does not matter."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


def blob_image(seed: Sequence[int], width: int = 256, height: int = 240) -> Image.Image:
    """A smooth grey image on black, mode L, that depends on the seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height  # both in units of the height
    centres = rng.uniform(0.3, 0.7, (4, 2))
    blobs = sum(np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / 0.02) for cy, cx in centres)
    return Image.fromarray((blobs / blobs.max() * 230).astype(np.uint8))


ABOUT = {"age": {"mean": 70.0, "std": 8.0, "low": 55.0, "high": 90.0}, "sex": {"categories": ["F", "M"]}}


def make_condition_embedding():
    """An embedding of age and sex whose functions are as after training, not 0."""
    from adni_ldm.models import ConditionEmbedding

    torch.manual_seed(1)
    made = ConditionEmbedding(ABOUT, token_dim=16)
    torch.nn.init.normal_(made.learned[0].linear_2.weight)
    torch.nn.init.normal_(made.learned[1].weight)
    return made


def make_pipeline(image_size: int = 16, condition_embedding=None):
    """A pipeline with random weights that samples 16 x 16 pixels in milliseconds."""
    from diffusers import DDIMScheduler

    from adni_ldm.models import ClassEmbedding, build_autoencoder, build_denoiser
    from adni_ldm.pipeline import ClassConditionalLDMPipeline

    torch.manual_seed(0)
    vae = build_autoencoder(image_size, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.5, 0.0, -0.5, 0.0], latents_std=[2.0, 1.0, 0.5, 1.0])
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    unet = build_denoiser(4, image_size // 2, widths=(32, 64), token_dim=16)
    made = ClassConditionalLDMPipeline(
        vae, unet, ClassEmbedding(token_dim=16), scheduler, condition_embedding
    )
    made.set_progress_bar_config(disable=True)
    return made
