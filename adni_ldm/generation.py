"""Sampling of many images: which scheduler, which seeds, in batches; denoising and class interpolation."""

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from queue import Queue
from threading import Event, Lock, Thread

import diffusers
import numpy as np
import torch
from diffusers import EulerDiscreteScheduler

from adni_ldm.pipeline import ClassConditionalLDMPipeline, check_scheduler

# Noise schedule, prediction type and trailing timesteps come from the pipeline's own scheduler. DPM-Solver++
# ends with a first-order step to the clean image, by default, and its steps are uniform in time: uniform in
# log SNR (use_lu_lambdas) they are more accurate on Gaussian latents and less accurate on brains, where many
# of them are spent at noise levels without anatomy.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

_scheduler_lock = Lock()  # a scheduler holds the state of one sampling loop


def use_scheduler(pipeline: ClassConditionalLDMPipeline, name: str) -> None:
    """Replace the pipeline's scheduler by another one, of SCHEDULERS, for the same noise schedule."""
    class_name, options = SCHEDULERS[name]
    scheduler_class, config = getattr(diffusers, class_name), pipeline.scheduler.config
    if "rescale_betas_zero_snr" not in inspect.signature(scheduler_class).parameters:
        # A class without the option ignores it, but takes betas: β_t = 1 − ᾱ_t / ᾱ_t−1. Euler's schedule has
        # ᾱ = 2⁻²⁴, not 0, at the last timestep, so that the noise level there is finite.
        alphas = EulerDiscreteScheduler.from_config(config).alphas_cumprod.double()
        betas = 1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])
        options = options | {"trained_betas": betas.tolist()}
    pipeline.scheduler = scheduler_class.from_config(config, **options)
    if "trained_betas" in options and config.get("trained_betas") is None:
        # for from_config they count as not given: another scheduler has the original schedule again
        defaults = [*pipeline.scheduler.config.get("_use_default_values", ()), "trained_betas"]
        pipeline.scheduler.register_to_config(_use_default_values=defaults)


def describe_sampling(pipeline: ClassConditionalLDMPipeline) -> str:
    """The scheduler and the sampling settings that a call without settings uses, for people to read."""
    own = pipeline.config
    return (
        f"{type(pipeline.scheduler).__name__}, {own.num_inference_steps} steps, guidance scale "
        f"{own.guidance_scale:g}, η = {own.eta:g}"
    )


def image_seed(seed: int, index: int) -> int:
    """Return the seed of image `index` in a run with `seed`; hashed, so that nearby seeds share no image."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint32)[0])


def generate_images(
    pipeline: ClassConditionalLDMPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    batch_size: int,
    precision: str = "no",
    **options,
) -> Iterator[torch.Tensor]:
    """Sample one image per label and seed; yields batches (B, 1, H, W) in [0, 1] on the CPU.

    Each image has its own generator, so that it depends on its seed and not on its batch (up to the rounding
    of batched arithmetic). `precision` is "no", "fp16" or "bf16", of the U-Net alone; `options` are further
    arguments of the pipeline's call.
    """
    pipeline.set_progress_bar_config(disable=True)  # of the steps of a batch
    for first in range(0, len(labels), batch_size):
        batch = slice(first, first + batch_size)
        # seeded on the CPU: a seed gives the same noise on every machine
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[batch]]
        with _autocast(pipeline.device, precision):
            result = pipeline(list(labels[batch]), generator=generators, output_type="pt", **options)
        yield result.images.float().cpu()


def generate_progressively(
    pipeline: ClassConditionalLDMPipeline,
    labels: Sequence[int],
    seeds: Sequence[int],
    every: int,
    precision: str = "no",
    **options,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Sample one batch as `generate_images` does; yields (steps done, images (B, 1, H, W) in [0, 1]).

    Yields the decoded latents every `every` steps, and at the end the images. Sampling runs in a thread, one
    at a time in the process; closing the iterator stops it after the present step. Raises ValueError as the
    pipeline's call.
    """
    updates: Queue[tuple[int, torch.Tensor] | Exception | None] = Queue()
    closed = Event()

    def report_progress(_pipeline, step, _timestep, tensors):
        if closed.is_set():
            raise InterruptedError("the iterator was closed")
        if (step + 1) % every == 0 and step + 1 < pipeline.num_timesteps:
            updates.put((step + 1, pipeline.decode_latents(tensors["latents"]).float().cpu()))
        return {}

    def sample():
        try:
            with _scheduler_lock:
                callback = {"callback_on_step_end": report_progress}
                batches = generate_images(
                    pipeline, labels, seeds, len(labels), precision, **callback, **options
                )
                images = next(batches)
                updates.put((pipeline.num_timesteps, images))
            updates.put(None)
        except Exception as error:
            updates.put(error)

    Thread(target=sample, daemon=True).start()
    try:
        while (update := updates.get()) is not None:
            if isinstance(update, Exception):
                raise update
            yield update
    finally:
        closed.set()


def denoising_trajectory(
    pipeline: ClassConditionalLDMPipeline,
    label: int,
    seed: int,
    frames: int,
    precision: str = "no",
    **options,
) -> torch.Tensor:
    """Sample one image and decode `frames` of its latents, (frames, 1, H, W) in [0, 1], from noise to image.

    `precision` and `options` as in `generate_images`.
    """
    shape = (1, pipeline.unet.config.in_channels, *[pipeline.unet.config.sample_size] * 2)
    generator = torch.Generator().manual_seed(seed)  # the noise of the steps follows the initial noise
    latents = [torch.randn(shape, generator=generator).to(pipeline.device)]
    options |= {"generator": generator, "output_type": "latent"}

    def keep(_pipeline, _step, _timestep, tensors):
        latents.append(tensors["latents"])
        return {}

    with _autocast(pipeline.device, precision):
        pipeline(label, latents=latents[0], callback_on_step_end=keep, **options)
    rows = torch.linspace(0, len(latents) - 1, min(frames, len(latents))).round().int().tolist()
    chosen = torch.cat([latents[row] for row in rows])
    return pipeline.decode_latents(chosen).float().cpu()


@torch.no_grad()
def interpolate_classes(
    pipeline: ClassConditionalLDMPipeline,
    source: str | int,
    target: str | int,
    seed: int,
    frames: int,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    conditions: Mapping[str, object] | None = None,
    extrapolate: bool = False,
) -> torch.Tensor:
    """Interpolate between two classes from one initial noise: (frames, 1, H, W) in [0, 1].

    The class tokens are interpolated linearly; the first and the last frame are the deterministic DDIM
    samples (η = 0) of the two classes from that seed; all have the same `conditions`. Number of steps and
    guidance scale are by default the model's own. Raises ValueError for an unknown class or condition, or a
    scheduler that does not follow the training's noise schedule.
    """
    check_scheduler(pipeline.scheduler)
    num_inference_steps, guidance_scale, _ = pipeline.sampling_settings(
        num_inference_steps, guidance_scale
    ).values()
    embedding, config = pipeline.class_embedding, pipeline.unet.config
    labels = [*embedding.labels_of([source, target]), embedding.null_label]
    labels = torch.tensor(labels, device=pipeline.device)
    rows = pipeline.condition_rows(conditions, len(labels), extrapolate)
    first, last, null = pipeline.encode_classes(labels, rows).split(1)  # (1, 2 + K, D)
    tokens = torch.cat([first.lerp(last, share) for share in torch.linspace(0, 1, frames).tolist()])
    if guidance_scale != 1:
        tokens = torch.cat([null.expand_as(tokens), tokens])  # (2 · frames, 2, D)
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pipeline.device)
    train_steps = len(pipeline.scheduler.alphas_cumprod)
    timesteps = torch.linspace(0, train_steps, num_inference_steps + 1)[1:].round().int() - 1
    latents = pipeline.ddim(noise.expand(frames, -1, -1, -1), timesteps, tokens, guidance_scale)
    return pipeline.decode_latents(latents).float().cpu()


def is_extrapolated(pipeline: ClassConditionalLDMPipeline, conditions: Mapping[str, str]) -> bool:
    """Whether a condition of one image is outside of its range in training."""
    try:
        pipeline.condition_rows(conditions, 1)
    except ValueError:
        return True
    return False


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def hash_pipeline(pipeline: ClassConditionalLDMPipeline) -> str:
    """`hash_weights` of all that has weights: identifies the model that an image came from."""
    parts = [pipeline.vae, pipeline.unet, pipeline.class_embedding, pipeline.condition_embedding]
    parts.append(pipeline.linear_calibration)
    return hash_weights(*(part for part in parts if part is not None))


def hash_weights(*modules: torch.nn.Module) -> str:
    """SHA-256 over the names and values of the modules' weights, first 16 hex digits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
