"""The autoencoder (VAE): diffusers' AutoencoderKL on patches of pixels, with a decoder that can be sampled.

This file is saved with every pipeline and loaded from there where adni_ldm is not installed, so it imports
nothing of the package. diffusers finds the loading method of a custom component by looking for its base class
in the component's module: `ModelMixin` must stay a name of this file.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401
from diffusers.utils.torch_utils import randn_tensor


class SliceAutoencoder(AutoencoderKL):
    """AutoencoderKL of one-channel slices (B, 1, H, W) in [-1, 1]; latents are (B, C, H / f, W / f).

    With a patch size p, a slice enters the network as p² channels of H / p pixels (pixel unshuffle) and
    leaves it likewise (Shi et al. 2016, arXiv:1609.05158). Convolutions over all pixels, the slowest ones,
    are then not needed. Any AutoencoderKL folder loads as one of patch size 1.

    The decoder of a VAE is a distribution p(x | z), of which `decode` returns the mean: an image that lacks
    the noise and the finest texture, which no latent holds. `decode(z, generator=…)` samples p(x | z), a
    Gaussian with the residuals' standard deviation by intensity and with the spatial spectrum of what the
    reconstructions of held-out slices lack, `set_decoder_noise`. Such texture has the right statistics and
    is not anatomy.
    """

    @property
    def patch_size(self) -> int:
        """Side p of a patch, pixels; `in_channels` and `out_channels` are p²."""
        return self.config.get("_patch_size", 1)

    @property
    def downsampling(self) -> int:
        """Factor f between the side of a slice and of its latent."""
        return self.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return super()._encode(F.pixel_unshuffle(x, self.patch_size))

    def _decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        patches = super()._decode(z, return_dict=False)[0]
        images = F.pixel_shuffle(patches, self.patch_size)  # (B, 1, H, W)
        return DecoderOutput(sample=images) if return_dict else (images,)

    # ---- Sampling p(x | z) -------------------------------------------------------------------------------

    def decode(
        self,
        z: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents (B, C, h, w) to the mean of p(x | z), or with a generator to a sample of it.

        A list of generators, one per latent, makes an image independent of its batch. Without
        `set_decoder_noise` the sample is the mean.
        """
        images = super().decode(z, return_dict=False)[0]
        if generator is not None and self.config.get("_decoder_noise"):
            images = images + self._noise(images, generator)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def _noise(self, images: torch.Tensor, generator) -> torch.Tensor:
        """Noise (B, 1, H, W) of the residuals' spectrum, scaled pixel by pixel to their deviation."""
        noise = self.config["_decoder_noise"]
        white = randn_tensor(images.shape, generator=generator, device=images.device, dtype=torch.float32)
        side = images.shape[-1]
        gain = torch.tensor(noise["spectrum"], device=images.device).sqrt()
        gain = _interpolate(_radius(side, images.device), gain)  # (H, W // 2 + 1)
        colored = torch.fft.irfft2(torch.fft.rfft2(white) * gain, s=images.shape[-2:])
        deviation = torch.tensor(noise["deviation"], device=images.device)
        return colored * _interpolate((images.float().clamp(-1, 1) + 1) / 2, deviation)

    @torch.no_grad()
    def set_decoder_noise(self, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
        """Measure the residuals of held-out slices (N, 1, H, W) in [-1, 1] and keep them in the config.

        `deviation` (33,) is the root mean square residual of pixels of a decoded intensity, from -1 to 1.
        `spectrum` (17,), in units of that deviation, is the power that reconstructions lack by radial
        frequency, from 0 to the corner of the spectrum, √2 of Nyquist's; at most that of the residuals.
        """
        decoded, residual = reconstructions.float(), images.float() - reconstructions.float()
        decoded = decoded.clamp(-1, 1)
        level = ((decoded + 1) / 2 * 32).round().long().flatten()  # the nearest of 33 intensities
        count = torch.bincount(level, minlength=33)
        square = torch.zeros(33).index_add(0, level, residual.square().flatten()) / count.clamp(min=1)
        known = torch.nonzero(count).flatten().numpy()  # intensities that occur; between them, interpolated
        deviation = np.interp(np.arange(33), known, square.sqrt()[known].numpy())
        scale = _interpolate((decoded + 1) / 2, torch.tensor(deviation).float())
        ring = (_radius(images.shape[-1], images.device) * 16).round().long().flatten()
        slices, means, errors = (
            torch.zeros(17).index_add(0, ring, _power(part).flatten()) / torch.bincount(ring, minlength=17)
            for part in (images, decoded, residual)
        )
        lacking = (slices - means).clamp(min=0).minimum(errors)
        spectrum = lacking / scale.square().sum((1, 2, 3)).mean().clamp(min=1e-12)
        self.register_to_config(
            _decoder_noise={
                "deviation": [round(value, 6) for value in deviation.tolist()],
                "spectrum": [round(value, 6) for value in spectrum.tolist()],
            }
        )


def _radius(side: int, device: torch.device) -> torch.Tensor:
    """Radial frequency (side, side // 2 + 1) of `rfft2`, 0 to 1 at the corner of the spectrum."""
    down, along = torch.fft.fftfreq(side, device=device), torch.fft.rfftfreq(side, device=device)
    return torch.hypot(down[:, None], along[None, :]) / 0.5**0.5


def _power(images: torch.Tensor) -> torch.Tensor:
    """Mean power (H, W // 2 + 1) of the frequencies of images (N, 1, H, W)."""
    return torch.fft.rfft2(images.float()).abs().square().mean((0, 1))


def _interpolate(positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values (K,) at equally spaced positions from 0 to 1, interpolated linearly at `positions` in [0, 1]."""
    place = positions * (len(values) - 1)
    low = place.floor().long().clamp(max=len(values) - 2)
    return torch.lerp(values[low], values[low + 1], (place - low).to(values.dtype))
