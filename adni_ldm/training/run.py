"""TrainingRun: the parts of a training run that do not depend on the method, which the recipe defines.

run = TrainingRun(cfg, "LDM", metrics=("loss", "val_loss"))     # processes, seed, output folder
train, val = run.load_slices()                                  # refuses data leakage between splits
run.prepare(model, backbone=unet)                               # optimizer, EMA, resume
for batch, rng in run.batches(train):
    run.step(loss(run.model, batch, rng))                       # gradients, clipping, EMA, metrics
    if run.every(100):
        with run.ema_weights(): ...                             # validate
run.apply_ema()
run.save(model)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from adni_ldm.config import TrainingConfig, save_config, settings_to_keep
from adni_ldm.data.folder import SUBJECTS_UNKNOWN
from adni_ldm.data.hub_datasets import as_folder
from adni_ldm.data.provenance import check_leakage, describe_data, training_records
from adni_ldm.data.slices import SliceTensors, open_folder, read_slices, to_arrays
from adni_ldm.errors import disk_errors
from adni_ldm.files import atomic_content, remove_leftovers
from adni_ldm.generation import hash_weights
from adni_ldm.output_lock import OutputLock
from adni_ldm.training.batch_sampling import BatchRandom, BatchSampler, load_batches
from adni_ldm.training.checkpoints import check_earlier_run, load_checkpoint, save_checkpoint, write_state
from adni_ldm.training.compute import check_compute_options, set_compute_options
from adni_ldm.training.ema import HalfLifeEMA, ema_weights, update_ema
from adni_ldm.training.fsdp import gather_full_weights
from adni_ldm.training.latents import LatentPosteriors, latent_encoder
from adni_ldm.training.launch import describe_compute, on_main_process, start_accelerator
from adni_ldm.training.metrics import MetricsLogger
from adni_ldm.training.optimizer import (
    build_optimizer,
    check_optimizer,
    learning_rate_at,
    set_learning_rate,
    trainable,
)
from adni_ldm.training.run_record import (
    check_finished,
    hash_columns,
    hash_slices,
    record_finish,
    record_start,
    run_identity,
)
from adni_ldm.training.update_guard import UpdateGuard, stop_nonfinite


class TrainingRun:
    """Processes, data, optimizer, EMA, checkpoints, metrics and signals of one training run.

    `name` is for the progress bar; `metrics` are columns of metrics.csv beside step, learning_rate, skipped.
    Raises UserError if the output folder holds another run, or this machine lacks what the settings need.
    """

    def __init__(self, cfg: TrainingConfig, name: str, metrics: Sequence[str]):
        check_compute_options(cfg.attention, cfg.optimizer)
        self.cfg, self.name, self.output_dir = cfg, name, Path(cfg.output_dir)
        names = ("output_dir", "mixed_precision", "gradient_accumulation_steps", "report_to", "seed")
        names += ("batch_size", "max_grad_norm", "deterministic")
        self.accelerator = start_accelerator(**{name: getattr(cfg, name) for name in names})
        check_optimizer(cfg.optimizer, self.accelerator.distributed_type)
        on_main_process(self.accelerator, self._open_output_dir)
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.print = self.accelerator.print
        self.on_gpu = self.device.type != "cpu"
        self.channels_last = self.on_gpu if cfg.channels_last is None else cfg.channels_last
        self.images_per_update = cfg.batch_size * cfg.gradient_accumulation_steps
        self.images_per_update *= self.accelerator.num_processes
        self.metric_names = (*metrics, "learning_rate", "skipped")
        self.hashes: dict[str, str] = {}  # of all that a resumed run must share with its first part
        self.notes: dict[str, str] = {}  # of what it should share
        self.updates = 0  # optimizer updates so far

    def _open_output_dir(self) -> None:
        """Lock the output folder, and remove what a kill left in it."""
        self.lock = OutputLock(self.output_dir)
        check_earlier_run(self.output_dir, self.cfg.resume_from_checkpoint)
        for folder in (self.output_dir, self.output_dir / "checkpoints"):
            remove_leftovers(folder)

    # ---- Data --------------------------------------------------------------------------------------------

    def load_slices(self, conditions: Sequence[str] = ()) -> tuple[SliceTensors, SliceTensors]:
        """Slices to train on and held-out ones, decoded by the main process; UserError for data leakage.

        `conditions` are columns that the slices have beside their labels.
        """
        cfg = self.cfg
        with self.accelerator.main_process_first():
            self.data_dir = as_folder(cfg.data_dir, cfg.class_names, **cfg.dataset_options)
            listing = open_folder(self.data_dir, cfg.class_names, cfg.table, conditions)
            splits = read_slices(listing, cfg.val_fraction)
            train, val = (SliceTensors(to_arrays(splits[name], cfg.image_size)) for name in ("train", "val"))
            self.data = describe_data(listing, splits)
        if not self.data.subjects_known:
            self.print(f"note: {SUBJECTS_UNKNOWN}")
        self.hashes |= hash_slices(self.accelerator, self.data, cfg.image_size, train=train, val=val)
        if conditions:
            self.hashes["conditions"] = hash_columns(train.conditions, val.conditions)
        self.print(f"{len(train)} training slices, {len(val)} held out; {describe_compute(self.accelerator)}")
        return train, val

    def check_leakage(self, name: str, model: ModelMixin) -> None:
        """Raise UserError if `model` was trained on subjects that the data of this run holds out."""
        check_leakage(name, model.config.get("_trained_on"), self.data)

    def record_training(self, model: ModelMixin) -> None:
        """Record in the model's config what this run trains it on, after what it was trained on before."""
        model.register_to_config(_trained_on=training_records(self.data, model.config.get("_trained_on")))

    def depends_on(self, **modules: nn.Module) -> None:
        """Record the weights that the run starts from: a resume with other ones is refused."""
        self.hashes |= {name: hash_weights(module) for name, module in modules.items()}

    def depends_on_latents(self, vae: AutoencoderKL, latents: LatentPosteriors) -> None:
        """Record the encoder; a resume with another decoder, which changes samples alone, only warns."""
        self.depends_on(**{"encoder of the VAE": latent_encoder(vae)})
        self.notes |= {"latents": latents.sha256, "VAE": hash_weights(vae)}

    # ---- Networks, optimizer, EMA, resume ----------------------------------------------------------------

    def prepare(
        self,
        *networks: nn.Module,
        backbone: ModelMixin,
        compiled: Sequence[nn.Module] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        """Prepare networks for training, and resume if the settings ask for it.

        Sets `models`, what must be called in training (`model` is the first), and builds the optimizer of
        all networks and the EMA of the first. The compute options apply to `backbone`, the diffusers model in
        the first network, and --compile to its parts `compiled`, by default all of it.
        """
        cfg, accelerator = self.cfg, self.accelerator
        if self.channels_last:
            networks[0].to(memory_format=torch.channels_last)
        set_compute_options(
            backbone,
            [backbone] if compiled is None else compiled,
            gradient_checkpointing=cfg.gradient_checkpointing,
            attention=cfg.attention,
            on_cpu=not self.on_gpu,
            compile=cfg.compile,
        )
        # One optimizer for all networks: gradient scaling, checks and checkpoints then see one update.
        groups = [{"params": trainable(network)} for network in networks]
        optimizer = build_optimizer(cfg.optimizer, groups, cfg.learning_rate, cfg.weight_decay, betas)
        *self.models, self.optimizer = accelerator.prepare(*networks, optimizer)
        self.model = self.models[0]
        self.trained = trainable(networks[0])  # after prepare, which may have replaced the parameters
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.deferred = self.device.type == "cuda" and cfg.optimizer == "adamw" and not sharded
        place = "cpu" if cfg.offload_ema else self.device
        averaged = (self.trained, cfg.ema_halflife_images, self.images_per_update, place)
        self.ema = HalfLifeEMA(*averaged) if cfg.use_ema else None
        self._resume()

    def _resume(self) -> None:
        """Load the checkpoint that the settings name, and open its records; exit 0 if it is finished."""
        cfg, accelerator = self.cfg, self.accelerator
        identity = run_identity(accelerator, settings_to_keep(cfg), self.data.hash, **self.hashes)
        identity["should"] |= self.notes
        if cfg.resume_from_checkpoint == "latest":
            if on_main_process(accelerator, check_finished, self.output_dir, identity):
                self._end(f"already finished: {self.output_dir} holds the model of step {cfg.max_steps}")
                raise SystemExit(0)
        self.state = {"identity": identity, "ema": self.ema}
        resumed = load_checkpoint(accelerator, self.output_dir, cfg.resume_from_checkpoint, **self.state)
        self.updates = resumed.pop("step")
        self.guard = UpdateGuard(accelerator, cfg.max_nonfinite, **resumed)
        if self.is_main:
            save_config(cfg, self.output_dir)
            record_start(self.output_dir, self.updates, identity)
        accelerator.init_trackers("logs")
        self.metrics = MetricsLogger(accelerator, self.output_dir, self.metric_names, self.updates)

    # ---- Updates -----------------------------------------------------------------------------------------

    def batches(self, source: Dataset) -> Iterator[tuple[object, BatchRandom]]:
        """Yield the batches that are left, each with its random numbers; the recipe calls `step` for each.

        Slices are read by a DataLoader as {"image": (B, 1, H, W), "label": (B,)} on the device; of cached
        latents, `source[indices]` is a batch.
        """
        cfg, accelerator = self.cfg, self.accelerator
        accumulation = cfg.gradient_accumulation_steps
        rows = {"process": accelerator.process_index, "num_processes": accelerator.num_processes}
        first, last = self.updates * accumulation, cfg.max_steps * accumulation
        sampler = BatchSampler(len(source), cfg.batch_size, cfg.seed, first, last, **rows)
        if isinstance(source, Dataset):
            workers = 2 * self.on_gpu if cfg.num_workers is None else cfg.num_workers
            loaded = load_batches(source, sampler, self.device, workers, self.channels_last)
        else:
            loaded = map(source.__getitem__, sampler)
        self.guard.listen()
        self.progress = tqdm(
            total=cfg.max_steps, initial=self.updates, desc=f"training {self.name}", disable=not self.is_main
        )
        for number, batch in enumerate(loaded, start=first):
            rng = BatchRandom(cfg.seed, number, cfg.batch_size, **rows, device=self.device)
            with accelerator.accumulate(*self.models):
                set_learning_rate(self.optimizer, self.learning_rate)
                yield batch, rng
            if accelerator.sync_gradients:
                self._end_update()
        self.progress.close()
        if cfg.checkpointing_steps:  # the last one is written: what follows is done again if a signal ends it
            self.guard.stop_at_once(f"stopped after step {self.updates}; its checkpoint is written")

    def validation_batches(self, source: Dataset, count: int) -> Iterator[tuple[object, BatchRandom]]:
        """About `count` rows of held-out data in batches; the same rows and random numbers each time."""
        size = self.cfg.batch_size
        for number in range(max(1, min(len(source), count) // size)):
            rows = [row % len(source) for row in range(number * size, (number + 1) * size)]
            yield source[rows], BatchRandom(self.cfg.seed, number, size, 0, 1, self.device)

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        cfg = self.cfg
        return learning_rate_at(self.updates, cfg.learning_rate, cfg.warmup_steps, cfg.max_steps)

    @property
    def updated(self) -> bool:
        """Whether the last `step` ended an update, and did not only accumulate gradients."""
        return self.accelerator.sync_gradients

    def step(
        self,
        loss: torch.Tensor,
        metrics: Mapping[str, torch.Tensor] | None = None,
        **inputs: torch.Tensor,
    ) -> None:
        """Back-propagate a loss; after the last batch of an update clip the gradients and update the weights.

        An update whose loss or gradient is not finite on some process is skipped on all of them. `metrics`
        are scalars for metrics.csv, by default the loss; a report on non-finite losses describes `inputs`.
        """
        accelerator, cfg = self.accelerator, self.cfg
        accelerator.backward(loss)
        self.metrics.add(**(metrics or {"loss": loss}))
        self.guard.add(loss, **inputs)
        if not accelerator.sync_gradients:
            return
        self.last_rate = self.learning_rate
        self._settle()  # the update before, which the device has finished by now
        norm = accelerator.clip_grad_norm_(self.model.parameters(), cfg.max_grad_norm)
        for network in self.models[1:]:  # the call above has unscaled the gradients of all
            norm = norm + nn.utils.clip_grad_norm_(network.parameters(), cfg.max_grad_norm)
        skip = self.guard.check(norm)
        if self.deferred and accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = skip  # fused AdamW skips on the device, as for a scaler
        elif not self.deferred and skip:
            self.optimizer.zero_grad()  # without gradients the step below changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if not self.deferred:
            self._settle()
        self.progress.update()
        if self.every(cfg.log_steps):
            counts = {"learning_rate": self.last_rate, "skipped": self.guard.skipped}
            row = self.metrics.write_means(self.updates, **counts)
            self.progress.set_postfix(loss=f"{row['loss']:.4f}")

    def every(self, steps: int) -> bool:
        """Whether the last `step` ended the last update, or a multiple of `steps`; never if `steps` is 0."""
        due = self.updated and steps > 0 and (self.updates % steps == 0 or self.updates == self.cfg.max_steps)
        if due:
            self._settle()
        return due

    def _settle(self) -> None:
        """Read whether the last update was applied, unless it was read before, and if so update the EMA."""
        if self.guard.settle() and self.ema:
            update_ema(self.ema, self.trained)

    def _end_update(self) -> None:
        """Write a checkpoint if one is due, and end the run on a signal or on too many skipped updates."""
        cfg, accelerator, guard = self.cfg, self.accelerator, self.guard
        last, every = self.updates == cfg.max_steps, cfg.checkpointing_steps
        due = every and (self.updates % every == 0 or last)
        if due or guard.stop or guard.exhausted:
            self._settle()
        state = {"step": self.updates, **self.state, **guard.counts}
        if due or guard.stop:
            self.metrics.flush()
            save_checkpoint(accelerator, self.output_dir, keep=cfg.checkpoints_total_limit, **state)
        if guard.exhausted:
            folder, weights = self.output_dir / "nonfinite", self.model.parameters()
            write_state(accelerator, folder, **state)
            stop_nonfinite(accelerator, folder, self.updates, guard, weights, learning_rate=self.last_rate)
        if guard.stop:
            self._end(f"{guard.stop.name}: stopped after step {self.updates}; its checkpoint is written")
            raise SystemExit(128 + guard.stop)  # SIGTERM: 143; SIGUSR1: 138

    # ---- Weights to validate and to save -----------------------------------------------------------------

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within the block the trained parameters hold their EMA. Every process enters it."""
        return ema_weights(self.ema, self.trained)

    full_weights = staticmethod(gather_full_weights)

    def log(self, **values: float) -> None:
        """Write values of this step to metrics.csv and the tracker, on the main process."""
        self.metrics.write(self.updates, **values)

    def message(self, text: str) -> None:
        """Print a line above the progress bar, on the main process."""
        if self.is_main:
            self.progress.write(text)

    def apply_ema(self) -> None:
        """After the last update: replace the trained parameters by their EMA, if there is one."""
        self._settle()
        if self.ema:
            self.ema.copy_to(self.trained)

    def save(self, model: ModelMixin, message: str) -> None:
        """Save a model or pipeline in the output folder, plot the metrics and end the run.

        Raises UserError if the disk is full. A kill leaves the whole model, or none.
        """
        if self.is_main:
            remedy = "free some space and start again with --resume_from_checkpoint latest"
            with disk_errors(f"the model of {self.output_dir}", remedy):
                self.metrics.plot()
                with atomic_content(self.output_dir, last=model.config_name) as partial:
                    model.save_pretrained(partial)
                record_finish(self.output_dir, model.config_name)
        self._end(message)
        self.guard.release_signals()

    def _end(self, message: str) -> None:
        """End trackers and processes, with a last message."""
        self.accelerator.end_training()
        if self.is_main:
            self.lock.release()
        self.print(message)
