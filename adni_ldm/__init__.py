"""adni_ldm: class-conditional latent diffusion on brain MRI slices, on diffusers and accelerate."""

from adni_ldm.environment import check_torch_pair

__version__ = "0.1.0"

check_torch_pair()  # before diffusers and transformers fail on a mismatched pair with an unrelated message
