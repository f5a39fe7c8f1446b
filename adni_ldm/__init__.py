"""adni_ldm: class-conditional latent diffusion on brain MRI slices, on diffusers and accelerate."""

__version__ = "0.1.0"
