"""Whole networks where FSDP keeps a share of each weight on every process."""

from __future__ import annotations

from diffusers.models.modeling_utils import ModelMixin
from torch.distributed.tensor import DTensor


def whole(network: ModelMixin) -> ModelMixin:
    """The network; under FSDP a copy of it with whole weights, gathered. Every process calls it.

    What is done with it needs no other process: a forward pass of a sharded network on one process alone
    would wait for the others for ever.
    """
    parameters = dict(network.named_parameters())
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return network
    # Entries with an underscore are notes. One says which arguments were defaults, and counts those given by
    # position among them, so that from_config would lose those.
    config = dict(network.config)
    config.pop("_use_default_values", None)
    copy = type(network).from_config({name: config[name] for name in config if name[0] != "_"})
    copy.register_to_config(**{name: config[name] for name in config if name[0] == "_"})
    for name, target in copy.named_parameters():
        source = parameters[name]
        target.data.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
    for (_, target), (_, source) in zip(copy.named_buffers(), network.named_buffers(), strict=True):
        target.copy_(source)
    device = next(iter(parameters.values())).device
    return copy.to(device).requires_grad_(False).eval()
