"""Full weights of a network that FSDP shards over the processes."""

from diffusers.models.modeling_utils import ModelMixin
from torch.distributed.tensor import DTensor


def gather_full_weights(network: ModelMixin) -> ModelMixin:
    """Return the network itself; under FSDP a copy of it with full weights. Every process calls it.

    The copy can be used by one process alone, where a forward pass of the sharded network would wait for the
    other processes forever.
    """
    parameters = dict(network.named_parameters())
    if not any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        return network
    # Entries with an underscore are notes. `_use_default_values` lists the arguments that were defaults and
    # counts positional ones among them, so that from_config would drop those.
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
