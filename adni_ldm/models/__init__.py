"""The networks: the autoencoder, the denoiser, and the class tokens that it reads."""

from adni_ldm.models.autoencoder import ReconstructingVAE, build_autoencoder, latent_shape
from adni_ldm.models.class_embedding import ClassEmbedding
from adni_ldm.models.condition_embedding import ConditionEmbedding
from adni_ldm.models.denoiser import ConditionalDenoiser, build_denoiser
from adni_ldm.models.linear_calibration import LinearCalibration
from adni_ldm.models.slice_autoencoder import SliceAutoencoder
