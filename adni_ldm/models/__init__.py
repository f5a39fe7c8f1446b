"""The networks: an autoencoder, a denoiser and the class tokens that it reads."""

from adni_ldm.models.autoencoder import build_autoencoder
from adni_ldm.models.class_embedding import ClassEmbedding
from adni_ldm.models.denoiser import ConditionalDenoiser, build_denoiser

__all__ = ["ClassEmbedding", "ConditionalDenoiser", "build_autoencoder", "build_denoiser"]
