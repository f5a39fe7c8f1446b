"""The pipeline: class-conditional sampling, counterfactuals, LoRA, saving and loading.

It is the one place that denoises and the one place that normalizes latents. This file is saved with every
pipeline as `pipeline.py`, so that `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` works
where adni_ldm is not installed. It therefore imports nothing but torch, diffusers and huggingface_hub;
loading a LoRA needs peft as well.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMParallelScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download


def _latent_statistics(vae: AutoencoderKL, like: torch.Tensor) -> list[torch.Tensor]:
    statistics = vae.config.latents_mean, vae.config.latents_std
    if None in statistics:
        raise ValueError(
            "the VAE's config has no latents_mean and latents_std, which train_vae.py measures when it ends: "
            "run train_vae.py on it with --resume_from_checkpoint latest"
        )
    return [_as_channels(tuple(values), like.device) for values in statistics]


@functools.lru_cache(maxsize=8)  # a training step that built them anew would wait for the GPU
def _as_channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def normalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Normalize VAE latents (B, C, h, w) to zero mean and unit variance per channel, as the U-Net takes them.

    z' = (z − μ) / σ with μ, σ the config's `latents_mean` and `latents_std` over the training set (Rombach et
    al. 2022, arXiv:2112.10752, appendix G, per channel). Computed and returned in float32. Raises ValueError
    if the statistics have not been measured yet.
    """
    mean, std = _latent_statistics(vae, latents)
    return (latents.float() - mean) / std


def denormalize_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Invert `normalize_latents`."""
    mean, std = _latent_statistics(vae, latents)
    return latents.float() * std + mean


def _under(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The weights whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Check that a scheduler follows the noise schedule and prediction type that its config describes.

    `from_config` keeps the options that a scheduler's class lacks in the config, and ignores them. Raises
    ValueError with the scheduler's name and what it ignores.
    """
    name, config = type(scheduler).__name__, scheduler.config
    options = inspect.signature(type(scheduler)).parameters
    neutral = {"prediction_type": ("epsilon",), "timestep_spacing": ("linspace", "leading")}
    for option, values in neutral.items():
        if option not in options and config.get(option, values[0]) not in values:
            raise ValueError(f"{name} ignores {option}={config[option]!r}: take a DDIMScheduler, for example")
    alphas = getattr(scheduler, "alphas_cumprod", None)  # (num_train_timesteps,)
    trained = DDIMScheduler.from_config(config).alphas_cumprod  # DDIM has every option of the schedule
    if alphas is None or (alphas.sqrt() - trained.to(alphas).sqrt()).abs().max() > 1e-3:
        raise ValueError(
            f"{name} does not follow the noise schedule that the U-Net was trained on, and ignores options "
            "such as rescale_betas_zero_snr; take a DDIMScheduler, for example, or pass it trained_betas"
        )


# Components of our own, with their modules, files that travel with a pipeline, and their classes.
CUSTOM = {
    "vae": ("slice_autoencoder", "SliceAutoencoder"),
    "class_embedding": ("class_embedding", "ClassEmbedding"),
    "condition_embedding": ("condition_embedding", "ConditionEmbedding"),
    "linear_calibration": ("linear_calibration", "LinearCalibration"),
}


class Counterfactual(NamedTuple):
    """Slices (B, 1, H, W) in [-1, 1], and differences between slices as fractions of the intensity range."""

    images: torch.Tensor  # the input slices in the target class
    difference: torch.Tensor  # (images − input) / 2, in [-1, 1]
    round_trip: torch.Tensor  # the input slices, inverted and sampled again in their own class
    error: torch.Tensor  # |round_trip − input| / 2: a smaller difference is not interpretable


class ClassConditionalLDMPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Samples slices (B, 1, H, W) conditioned on diagnosis with a latent diffusion model.

    Args:
        vae: autoencoder with `latents_mean` and `latents_std` in its config.
        unet: denoiser of normalized latents; its cross-attention reads the class tokens.
        class_embedding: labels (B,) to class tokens (B, 2, D); its last label is the null class.
        scheduler: any diffusers scheduler that has the training's noise schedule and `prediction_type`.
        condition_embedding: covariates (B, K) to tokens (B, K, D) that follow the class tokens; None for a
            model without conditions.
        linear_calibration: combines the U-Net's prediction with that of the latents' mean and covariance;
            None for a U-Net that predicts alone.
        num_inference_steps, guidance_scale, eta: the model's own sampling settings, saved with it in
            model_index.json, for calls that give no others. With η = 1 (ancestral sampling) and without
            guidance, samples vary within the classes as real slices do: docs/sampling.md.
    """

    model_cpu_offload_seq = "class_embedding->condition_embedding->unet->vae"
    _exclude_from_cpu_offload = ["linear_calibration"]  # small, and used after each pass of the U-Net
    _optional_components = ["condition_embedding", "linear_calibration"]
    _callback_tensor_inputs = ["latents"]
    text_encoder_name = "class_embedding"  # in a LoRA file, class tokens take the text encoder's place

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        class_embedding: ModelMixin,
        scheduler: SchedulerMixin,
        condition_embedding: ModelMixin | None = None,
        linear_calibration: ModelMixin | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 1.0,
        decoder_noise: bool = True,
    ):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, class_embedding=class_embedding, scheduler=scheduler)
        self.register_modules(condition_embedding=condition_embedding, linear_calibration=linear_calibration)
        self.register_to_config(**self.sampling_settings(num_inference_steps, guidance_scale, eta))
        self.register_to_config(decoder_noise=decoder_noise)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) * getattr(vae, "patch_size", 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    # ---- Sampling ----------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """Guidance scale w of the present call; a callback may change it by `pipeline._guidance_scale`."""
        return self.__dict__.get("_guidance_scale", self.config.guidance_scale)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the U-Net is evaluated with the class and without it."""
        return self.guidance_scale != 1

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the present call."""
        return self._num_timesteps

    def sampling_settings(
        self,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
    ) -> dict[str, int | float]:
        """The settings that are given, and the model's own, of its config, in place of None.

        Raises ValueError for less than one step, or η outside 0 to 1.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        eta = self.config.eta if eta is None else eta
        if steps < 1:
            raise ValueError(f"num_inference_steps={steps} must be at least 1")
        if not 0 <= eta <= 1:
            raise ValueError(f"{eta=} must lie in [0, 1]")
        # floats: diffusers warns of integers in their place when it loads a pipeline
        return {"num_inference_steps": steps, "guidance_scale": float(scale), "eta": float(eta)}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Iterable[str | int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        conditions: Mapping[str, object] | None = None,
        guide_conditions: bool = False,
        extrapolate: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        decoder_noise: bool | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Iterable[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Sample `num_images_per_prompt` slices for each class label.

        Number of steps, guidance scale and η that are None are the model's own, which its config has.

        Args:
            class_labels: classes by name or number, one or several: "AD", 0, ["AD", "NC"].
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance scale w in ε = ε(∅) + w (ε(c) − ε(∅)), the form of Ho &
                Salimans 2022, arXiv:2207.12598, equation 6, with w for w + 1; 1 means no guidance.
            eta: stochasticity of DDIM (Song et al. 2021, arXiv:2010.02502, equation 16), from 0, which is
                deterministic, to 1, ancestral sampling; other schedulers ignore it.
            conditions: covariates by name, {"age": 75, "sex": "F"}; a list has a value for each image. What
                is not given is marginal: as it is distributed in the training data.
            guide_conditions: let guidance strengthen the conditions too, and not the class alone.
            extrapolate: allow numbers outside of their range in the training data.
            guidance_interval: guidance interval (Kynkäänniemi et al. 2024, arXiv:2404.07724) as fractions of
                the noise schedule: 0 is the clean image, 1 pure noise. Timesteps outside of it are not
                guided, at half the cost.
            decoder_noise: whether the decoder is sampled, which adds the noise and the finest texture of real
                slices, or its mean is the image; None: as the model's config says. For VAEs of train_vae.py.
            generator: of the initial noise and then of the steps' noise: one for the whole batch, or a list
                with one per image, which makes an image independent of the batch that it was sampled in.
            latents: initial noise (B, C, h, w) of unit variance; sampled from `generator` if None. With
                η > 0 the image depends on the steps' noise, hence on `generator`, as well.
            output_type: "pil" (8-bit grey), "np" (B, H, W, 1) or "pt" (B, 1, H, W) in [0, 1], or "latent"
                (B, C, h, w), normalized.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": …}); may return a dict
                that replaces the latents, and may set `pipeline._guidance_scale`.

        Returns:
            `ImagePipelineOutput` with `.images`, or a tuple with them when `return_dict` is False.

        Raises:
            ValueError: a wrong argument, or a scheduler that does not follow the training's noise schedule.
        """
        labels = self._labels(class_labels, num_images_per_prompt).to(self._execution_device)  # (B,)
        low, high = guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance_interval={guidance_interval} must be LOW < HIGH within 0 and 1")
        self._check_inputs(len(labels), generator, output_type, callback_on_step_end_tensor_inputs)
        check_scheduler(self.scheduler)
        settings = self.sampling_settings(num_inference_steps, guidance_scale, eta)
        num_inference_steps, self._guidance_scale, eta = settings.values()
        latents = self._initial_latents(len(labels), generator, latents)
        null = torch.full_like(labels, self.class_embedding.null_label)
        rows = self.condition_rows(conditions, len(labels), extrapolate)  # (B, K)
        unguided = torch.full_like(rows, torch.nan) if guide_conditions else rows
        tokens = self.encode_classes(torch.cat([null, labels]), torch.cat([unguided, rows]))  # (2B, 2 + K, D)
        step_kwargs = self._step_kwargs(eta, generator)

        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        timesteps, train_steps = self.scheduler.timesteps, self.scheduler.config.num_train_timesteps
        self._num_timesteps = len(timesteps)
        values = timesteps.tolist()
        if values[0] >= train_steps:  # steps_offset, which Stable Diffusion's schedule has
            raise ValueError(f"{num_inference_steps=} starts after the last timestep; give fewer")
        latents = latents * self.scheduler.init_noise_sigma
        with self.progress_bar(total=num_inference_steps) as progress:
            for step, (timestep, value, following) in enumerate(zip(timesteps, values, [*values[1:], -1])):
                if isinstance(self.scheduler, (DDIMScheduler, DDIMParallelScheduler)):
                    # DDIM steps back by train_steps // num_inference_steps, which misses the next timestep
                    # where that does not divide: this number of steps makes it the exact distance.
                    self.scheduler.num_inference_steps = Fraction(train_steps, value - following)
                # 1. Predict, with and without the class in one batch; outside the interval with it alone.
                scale = self.guidance_scale if low <= value / train_steps <= high else 1
                prediction = self._predict(latents, timestep, tokens, scale)
                # 2. Step back: x_t -> x_t-1.
                latents = self.scheduler.step(
                    prediction, timestep, latents, **step_kwargs, return_dict=False
                )[0]
                latents = latents + self._missing_noise(latents, value, following, eta, generator)

                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    changed = callback_on_step_end(self, step, timestep, tensors) or {}
                    latents = changed.get("latents", latents)
                if step + 1 == len(timesteps) or (step + 1) % self.scheduler.order == 0:
                    progress.update()

        images = latents
        if output_type != "latent":
            noisy = self.config.decoder_noise if decoder_noise is None else decoder_noise
            source = (generator or torch.default_generator) if noisy else None
            images = self.decode_latents(latents, output_type, source)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, class_labels: str | int | Iterable, num_images_per_prompt: int) -> torch.Tensor:
        labels = self.class_embedding.labels_of(class_labels)
        if not labels or num_images_per_prompt < 1:
            raise ValueError(f"no images: {class_labels=}, {num_images_per_prompt=}")
        return torch.tensor(labels).repeat_interleave(num_images_per_prompt)

    def _check_inputs(self, batch_size, generator, output_type, tensor_inputs) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be one of pil, np, pt, latent")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"{len(generator)} generators for {batch_size} images: give 1, or 1 per image")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {unknown} must be in {self._callback_tensor_inputs}"
            )

    def _initial_latents(self, batch_size: int, generator, latents: torch.Tensor | None) -> torch.Tensor:
        size, device = self.unet.config.sample_size, self._execution_device
        shape = (batch_size, self.unet.config.in_channels, size, size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        if latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, not {tuple(latents.shape)}")
        return latents.to(device, self.unet.dtype)

    def condition_rows(self, conditions, count: int, extrapolate: bool = False) -> torch.Tensor:
        """Rows (count, K) of `conditions` as in `__call__`; ValueError for those that the model lacks."""
        if self.condition_embedding is not None:
            return self.condition_embedding.rows_of(conditions, count, extrapolate)
        if conditions:
            raise ValueError(f"{conditions=}: this model was trained without conditions")
        return torch.empty(count, 0)

    def encode_classes(self, labels: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens (B, 2 + K, D) of labels (B,) and conditions (B, K), NaN where missing; None: all of them."""
        tokens = self.class_embedding(labels, return_dict=False)[0]
        if self.condition_embedding is None:
            return tokens
        rows = self.condition_rows(None, len(labels)) if rows is None else rows
        added = self.condition_embedding(rows.to(labels.device), return_dict=False)[0]
        return torch.cat([tokens, added], dim=1)

    def _predict(self, latents, timestep, tokens, guidance_scale: float) -> torch.Tensor:
        guided = guidance_scale != 1
        inputs = torch.cat([latents] * 2) if guided else latents
        tokens = tokens[-len(inputs) :]  # without guidance, the conditional tokens alone: they are last
        inputs = self.scheduler.scale_model_input(inputs, timestep).to(self.unet.dtype)
        prediction = self.unet(inputs, timestep, encoder_hidden_states=tokens, return_dict=False)[0].float()
        if guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        if self.linear_calibration is not None:
            prediction = self.linear_calibration(prediction, inputs[: len(latents)], timestep)
        return prediction

    def _missing_noise(self, latents, timestep: int, following: int, eta: float, generator):
        """Noise (B, C, h, w) that a DDIM step from `timestep` to `following` lacks; 0 for other schedulers.

        With η = 1 DDIM's variance is β̃, which is right where the clean latents are known. The step's mean
        then omits their posterior variance, and latents lose it step by step: with 50 steps and an exact
        denoiser, 6 % of the standard deviation of directions of unit variance and 16 % of those of 0.1, the
        finest ones. β, which adds the rest, is right for latents of unit variance (Ho et al. 2020,
        arXiv:2006.11239, section 3.2): 1 % and 3 %, but 6 % of those of variance 100. A linear calibration
        knows the posterior variances (Bao et al. 2022, arXiv:2201.06503, theorem 1, by direction). Not at
        the last step, after which nothing removes noise.
        """
        if not eta or following < 0 or not isinstance(self.scheduler, (DDIMScheduler, DDIMParallelScheduler)):
            return 0
        now, then = self.scheduler.alphas_cumprod[[timestep, following]].tolist()
        variance = (1 - now / then) * (then - now) / (1 - now)  # β − β̃
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        if self.linear_calibration is not None:
            noise = self.linear_calibration.posterior_noise(noise, timestep)
        return eta * variance**0.5 * noise

    def _step_kwargs(self, eta: float, generator) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        # At zero SNR and η = 1 DDIM takes the root of 1 − ᾱ − σ² = 0, which rounding makes negative: NaN.
        offered = {"eta": min(eta, 1 - 1e-4), "generator": generator}
        return {name: value for name, value in offered.items() if name in accepted}

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pt", generator=None):
        """Decode normalized latents (B, C, h, w) to slices; `output_type` as in `__call__`.

        With a generator, or one for each latent, the decoder is sampled where its noise has been measured.
        """
        # Half precision overflows in the decoder's activations, so it always runs in float32.
        dtype = self.vae.dtype
        if dtype != torch.float32:
            self.vae.to(torch.float32)
        with torch.autocast(latents.device.type, enabled=False):
            latents = denormalize_latents(self.vae, latents)
            images = self.vae.decode(latents, return_dict=False, generator=generator)[0]
        if dtype != torch.float32:
            self.vae.to(dtype)
        return self.image_processor.postprocess(images, output_type=output_type)

    # ---- Counterfactuals ---------------------------------------------------------------------------------

    @torch.no_grad()
    def counterfactual(
        self,
        image: torch.Tensor,
        source: str | int = "NC",
        target: str | int = "AD",
        strength: float = 0.8,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        conditions: Mapping[str, object] | None = None,
        target_conditions: Mapping[str, object] | None = None,
        extrapolate: bool = False,
    ) -> Counterfactual:
        """Translate slices (B, 1, H, W) in [-1, 1] of the class `source` to the class `target`.

        DDIM inversion in the class `source`, then DDIM sampling in the class `target` and, to measure the
        error of the method, in `source` again: all of it deterministic (η = 0), whatever the model's own η.

        Args:
            strength: fraction of the noise schedule that is inverted, 0 (the autoencoder alone) to 1 (pure
                noise). A higher strength lets the class change more and preserves less of the subject.
            num_inference_steps: DDIM steps in each direction, two or more; None: the model's own.
            guidance_scale: guidance scale w of ε = ε(source) + w (ε(target) − ε(source)); None: the model's.
            conditions: covariates of the input slices, as in `__call__`; they are kept.
            target_conditions: those that are changed, {"age": 85}, in place of or beside the class.

        Raises:
            ValueError: a wrong argument, or a scheduler of another noise schedule or that scales its latents.
        """
        size, size_given = self.unet.config.sample_size * self.vae_scale_factor, tuple(image.shape)
        if image.ndim != 4 or size_given[1:] != (1, size, size) or not image.abs().max() <= 1.01:
            raise ValueError(f"image must be (B, 1, {size}, {size}) in [-1, 1], not {size_given}")
        num_inference_steps, guidance_scale, _ = self.sampling_settings(
            num_inference_steps, guidance_scale
        ).values()
        if not 0 <= strength <= 1 or num_inference_steps < 2:
            raise ValueError(f"{strength=} must lie in [0, 1], {num_inference_steps=} be 2 or more")
        check_scheduler(self.scheduler)
        if self.scheduler.init_noise_sigma != 1:
            raise ValueError(f"{type(self.scheduler).__name__} scales its latents: take a DDIMScheduler")
        image = image.to(self._execution_device, torch.float32)
        clean = self.vae.encode(image.to(self.vae.dtype)).latent_dist.mean
        clean = normalize_latents(self.vae, clean)  # (B, C, h, w)
        changed = {**(conditions or {}), **(target_conditions or {})}
        own, other = (
            self.encode_classes(
                self._labels(name, len(image)).to(image.device),
                self.condition_rows(given, len(image), extrapolate),
            )
            for name, given in ((source, conditions), (target, changed))
        )

        highest = strength * len(self.scheduler.alphas_cumprod)
        timesteps = torch.linspace(0, highest, num_inference_steps + 1).round().int().unique()[1:] - 1
        noisy = self.ddim(clean, timesteps, own, invert=True)
        tokens = other if guidance_scale == 1 else torch.cat([own, other])
        there = self.ddim(noisy, timesteps, tokens, guidance_scale)
        back = self.ddim(noisy, timesteps, own)
        images, round_trip = (2 * self.decode_latents(latents) - 1 for latents in (there, back))
        return Counterfactual(images, (images - image) / 2, round_trip, (round_trip - image).abs() / 2)

    @torch.no_grad()
    def ddim(self, latents, timesteps, tokens, guidance_scale: float = 1, invert: bool = False):
        """DDIM sampling of latents (B, C, h, w) from the last of the rising `timesteps`, or its inversion.

        With ᾱ = cos²φ a step is a rotation by δ, z' = cos δ z − sin δ v(z) (Salimans & Ho 2022,
        arXiv:2202.00512, appendix D), which is defined at zero SNR as well. DDIM inversion needs v(z) at the
        z that it solves for, and finds it by fixed-point iteration (Pan et al. 2023, arXiv:2309.04907).
        """
        angles = self.scheduler.alphas_cumprod[timesteps].sqrt().arccos()
        path = list(zip(timesteps, angles, angles.diff(prepend=torch.zeros(1))))
        for timestep, angle, turn in path if invert else reversed(path):
            start = latents
            for _ in range(3 if invert else 1):
                velocity = self._predict(latents, timestep, tokens, guidance_scale)
                if self.scheduler.config.prediction_type == "epsilon":
                    velocity = (velocity - angle.sin() * latents) / angle.cos()
                if invert:
                    latents = (start + turn.sin() * velocity) / turn.cos()
                else:
                    latents = turn.cos() * start - turn.sin() * velocity
        return latents

    # ---- LoRA --------------------------------------------------------------------------------------------

    def load_lora_weights(
        self, source: str | Path | dict[str, torch.Tensor], adapter_name: str | None = None, **kwargs
    ) -> None:
        """Load a LoRA of train_ldm.py --lora_rank into the U-Net, with its class tokens, class names and
        conditions.

        `set_adapters`, `disable_lora` and `fuse_lora` are diffusers' own and act on the U-Net alone. Of
        several LoRAs, tokens and conditions are the last one's; `unload_lora_weights` restores its own.

        `source` is a folder, file or Hub name of pytorch_lora_weights.safetensors, or its tensors; `kwargs`
        are those of diffusers' `lora_state_dict`, as `revision` or `token`. Raises ValueError for a file of
        another type (diffusers takes a `weight_name` that ends in .bin for a pickle), and for one that is
        damaged or of another model; OSError if there is none.
        """
        name = "the tensors given" if isinstance(source, dict) else source
        files = [kwargs.get("weight_name"), name if Path(name).is_file() else None]
        if unsafe := [file for file in files if file and Path(file).suffix != ".safetensors"]:
            raise ValueError(f"{unsafe[0]}: a LoRA is loaded from a .safetensors file")
        try:
            self._load_lora(source, adapter_name, **kwargs)
        except OSError:
            raise
        except Exception as error:  # of a damaged file, safetensors, diffusers and peft raise nearly any
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{name}: not a LoRA of this pipeline ({reason})") from error

    def _load_lora(self, source, adapter_name: str | None, **kwargs) -> None:
        kwargs |= {"use_safetensors": True, "return_lora_metadata": True}
        weights, _, metadata = self.lora_state_dict(source, **kwargs)
        metadata = metadata or {}
        of_conditions = _under(weights, "class_embedding.conditions.")
        tokens = _under(weights, "class_embedding.")
        tokens = {name: tokens[name] for name in tokens if not name.startswith("conditions.")}
        own, records = self.class_embedding, self.unet.config.get("_trained_on")
        width, embeddings = own.config.token_dim, {}
        if tokens:
            names = metadata.get("class_embedding.class_names", own.config.class_names)
            tuned = type(own)(list(names), width, tokens["table.weight"].shape[1] // width)
            tuned.load_state_dict(tokens)
            embeddings["class_embedding"] = tuned.to(own.device, own.dtype)
        if of_conditions:
            tuned = self._condition_embedding_type()(metadata["class_embedding.conditions"], width)
            tuned.load_state_dict(of_conditions)
            embeddings["condition_embedding"] = tuned.to(own.device, own.dtype)
        self.load_lora_into_unet(weights, None, self.unet, adapter_name=adapter_name, _pipeline=self)
        if getattr(self, "_before_lora", None) is None:
            self._before_lora = (own, self.condition_embedding, records, self.linear_calibration)
        # What was fitted to the latents of other data, and to another U-Net, does not count any more.
        self.register_modules(**embeddings, linear_calibration=None)
        self.unet.register_to_config(_trained_on=metadata.get("class_embedding.trained_on", records))

    def _condition_embedding_type(self) -> type:
        if self.condition_embedding is not None:
            return type(self.condition_embedding)
        try:  # the folder of a pipeline without conditions does not hold this code
            return importlib.import_module("adni_ldm.models.condition_embedding").ConditionEmbedding
        except ImportError as error:
            raise ValueError("its conditions need adni-ldm: pip install adni-ldm") from error

    def unload_lora_weights(self) -> None:
        """Remove all LoRAs and restore the pipeline's own class names, class tokens and conditions."""
        super().unload_lora_weights()
        if getattr(self, "_before_lora", None) is not None:
            classes, conditions, records, calibration = self._before_lora
            self.register_modules(class_embedding=classes, condition_embedding=conditions)
            if not self.num_fused_loras:  # else the LoRA stays in the U-Net that it was fitted to
                self.register_modules(linear_calibration=calibration)
            self.unet.register_to_config(_trained_on=records)
            self._before_lora = None

    # ---- Saving and loading ------------------------------------------------------------------------------

    def save_config(self, save_directory: str | Path, **kwargs) -> None:
        """Write `model_index.json`, and beside it the code that `trust_remote_code=True` loads.

        diffusers looks for a custom class in a file of the folder when the index names it as a pair
        [file, class]: `pipeline.py` at the top, and each custom component's in the component's folder.
        """
        super().save_config(save_directory, **kwargs)
        index_path = Path(save_directory, self.config_name)
        index = json.loads(index_path.read_text())
        index["_class_name"] = ["pipeline", ClassConditionalLDMPipeline.__name__]
        files = {"pipeline.py": ClassConditionalLDMPipeline}
        for part, (module, _) in CUSTOM.items():
            defined = type(getattr(self, part))  # NoneType, of builtins, without conditions
            if defined.__module__.rpartition(".")[2] == module:  # not diffusers' own AutoencoderKL
                index[part] = [module, defined.__name__]
                files[f"{part}/{module}.py"] = defined
        index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        for name, defined in files.items():
            source, target = Path(inspect.getsourcefile(defined)), Path(save_directory, name)
            target.parent.mkdir(exist_ok=True)
            if source.resolve() != target.resolve():
                shutil.copyfile(source, target)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As diffusers', but an installed package checks the folder and loads its own classes, not its code.

        Raises ValueError if the folder names a class or weights that are not loaded from a model.
        """
        installed, folder = cls.__module__ == "adni_ldm.pipeline", Path(pretrained_model_name_or_path)
        if installed and folder.is_dir():  # imported by name: this file must load without the package
            importlib.import_module("adni_ldm.models.components").check_model_folder(folder)
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if installed:
            config["_class_name"] = cls.__name__
            for part, (name, kind) in CUSTOM.items():
                if (config.get(part) or [None])[0]:
                    module = importlib.import_module(f"adni_ldm.models.{name}")
                    config[part] = [module.__name__, kind]
        return loaded

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Download a pipeline from the Hub without its code files."""
        names = ("cache_dir", "proxies", "local_files_only", "token", "revision", "force_download")
        options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        patterns = ["*.json", "*.safetensors"]
        folder = snapshot_download(pretrained_model_name, allow_patterns=patterns, **options)
        if not (Path(folder) / cls.config_name).is_file():
            raise OSError(f"there is no {cls.config_name} in it")
        return folder
