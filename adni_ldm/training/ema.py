"""EMA: the exponential moving average of the weights, which is sampled from and saved."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel


class HalfLifeEMA(EMAModel):
    """diffusers' EMA with a half-life in images instead of a decay per update.

    The average then does not depend on the batch size or the number of processes (as in Karras et al. 2022,
    arXiv:2206.00364, code of appendix F). `batch_images` is the number of images of an update, over all
    processes and accumulated batches; the average is kept on `device`, which may be the CPU.
    """

    RAMP_UP = 0.08  # longest half-life as a share of the images seen, so that the random start fades early

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        halflife_images: float,
        batch_images: int,
        device: torch.device | str,
    ):
        parameters = list(parameters)
        sharded = hasattr(parameters[0], "to_local")  # by FSDP, whose tensors do not support foreach
        super().__init__(parameters, foreach=not sharded)
        self.halflife_images, self.batch_images = halflife_images, batch_images
        self.to(device)

    def get_decay(self, optimization_step: int) -> float:
        """Share of the average that update `optimization_step`, from 1, keeps."""
        seen = optimization_step * self.batch_images
        return 0.5 ** (self.batch_images / min(self.halflife_images, self.RAMP_UP * seen))


def update_ema(ema: EMAModel, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Update the average with the present weights, wherever it is kept."""
    parameters = list(parameters)
    device = ema.shadow_params[0].device
    if parameters[0].device != device:
        # EMAModel averages what requires a gradient and copies the rest: so parameters, not plain tensors.
        parameters = [
            torch.nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
            for parameter in parameters
        ]
    ema.step(parameters)


@contextmanager
def ema_weights(ema: EMAModel | None, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Within the block the parameters hold their average; without an `ema` they stay as they are."""
    if ema is None:
        yield
        return
    parameters = list(parameters)
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)
