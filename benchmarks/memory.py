"""Memory of fine-tuning Stable Diffusion's U-Net, by counted bytes, and its operations. Nothing is computed.

    python benchmarks/memory.py [--image_size 256] [--batch_size 8]

The U-Net of Stable Diffusion 1.5 is built without storage (device "meta"). Counted are weights, gradients,
AdamW's moments, the EMA, the half-precision copies that autocast makes, and the activations that a forward
pass in bf16 keeps for the backward pass. Float32 copies that normalization makes under autocast, kernels'
workspaces, fragmentation and CUDA itself come on top.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from measure import RESULTS, report, table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adni_ldm.training.finetuning import add_lora, freeze, halve_frozen

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}  # else diffusers' defaults
GIB = 2**30
KEYS_AND_VALUES = ("unet.*", "!*.attn2.to_[kv].*")
MODES = (  # title, --freeze, --lora_rank, --half_frozen, bytes of a moment, EMA in device memory
    ("all weights", (), 0, False, 4, True),
    ("all weights, 8-bit AdamW, EMA offloaded", (), 0, False, 1, False),
    ("keys and values, half_frozen", KEYS_AND_VALUES, 0, True, 4, True),
    ("LoRA of rank 16", (), 16, False, 4, True),
    ("LoRA of rank 16, half_frozen", (), 16, True, 4, True),
)
COLUMNS = ("trained", "million trained", "weights", "gradients", "moments", "EMA", "autocast", "activations")


def build(frozen: tuple[str, ...], lora_rank: int, half_frozen: bool) -> nn.ModuleDict:
    """Stable Diffusion 1.5's U-Net without storage, as train_ldm.py sets it up."""
    with torch.device("meta"):
        network = nn.ModuleDict({"unet": UNet2DConditionModel(**SD15)})
        if lora_rank:
            add_lora(network["unet"], lora_rank)
    freeze(network, frozen)
    if half_frozen:
        halve_frozen(network["unet"], "bf16")
    return network


def count(network: nn.Module, moment_bytes: int, ema: bool) -> dict[str, int]:
    """Bytes of all but the activations."""
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # of each float32 matrix, autocast makes a half copy, which the backward pass needs
    copies = sum(p.numel() for p in parameters if p.dtype == torch.float32 and p.ndim > 1)
    return {
        "trained": trained,
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": 4 * trained,
        "moments": 2 * moment_bytes * trained,
        "EMA": 4 * trained * ema,
        "autocast": 2 * copies,
    }


def activations(network: nn.Module, batch_size: int, latent_size: int, checkpointing: bool) -> int:
    """Bytes that a forward pass in bf16 keeps for the backward pass.

    With gradient checkpointing: the inputs of the blocks, and the largest block, which is computed again.
    """
    unet, kept, blocks, open_blocks = network["unet"].to(torch.bfloat16), {}, [], []
    weights = {id(p.untyped_storage()) for p in unet.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept[id(storage)] = storage  # held, so that no other tensor has its identity
        return tensor

    def total() -> int:
        return sum(storage.nbytes() for storage in kept.values())

    for module in unet.modules():
        if isinstance(module, (ResnetBlock2D, Transformer2DModel)):
            module.register_forward_pre_hook(lambda *_: open_blocks.append(total()))
            module.register_forward_hook(lambda *_: blocks.append(total() - open_blocks.pop()))
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noisy = torch.empty(batch_size, 4, latent_size, latent_size, dtype=torch.bfloat16)
        tokens = torch.empty(batch_size, 2, SD15["cross_attention_dim"], dtype=torch.bfloat16)
        unet(noisy, torch.empty(batch_size, dtype=torch.int64), tokens)
    if not checkpointing:
        return total()
    return total() - sum(blocks) + max(blocks) + _inputs(unet, batch_size, latent_size)


def _inputs(unet: nn.Module, batch_size: int, latent_size: int) -> int:
    """Bytes of the inputs of all blocks, in bf16; those of the way up have the skip connections as well."""
    widths, layers = unet.config.block_out_channels, unet.config.layers_per_block
    down = sum(2 * layers * width * (latent_size >> level) ** 2 for level, width in enumerate(widths))
    return 2 * batch_size * 3 * down


def operations(network: nn.Module, latent_size: int) -> tuple[int, int]:
    """FLOP of one image: of the forward pass, and of forward and backward pass with all weights trained."""
    found = []
    for backward in (False, True):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            noisy = torch.empty(1, 4, latent_size, latent_size)
            tokens = torch.empty(1, 2, SD15["cross_attention_dim"])
            prediction = network["unet"](noisy, torch.empty(1, dtype=torch.int64), tokens).sample
            if backward:
                prediction.sum().backward()
        found.append(counter.get_total_flops())
    return tuple(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image_size", type=int, default=256, help="side of the slice, pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="slices of a batch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that the page is written to")
    options = parser.parse_args()
    size = (options.batch_size, options.image_size // 8)
    rows = []
    for title, frozen, rank, half, moment_bytes, ema in MODES:
        for checkpointing in (False, True):
            counted = count(build(frozen, rank, half), moment_bytes, ema)
            counted["activations"] = activations(build(frozen, rank, half), *size, checkpointing)
            trained = counted.pop("trained")
            cells = [f"{value / GIB:.2f}" for value in counted.values()]
            name = title + (", gradient checkpointing" if checkpointing else "")
            total = f"**{sum(counted.values()) / GIB:.1f}**"
            rows.append((name, f"{trained / 1e6:.1f}", *cells, total))
            print(" | ".join(rows[-1]), flush=True)
    forward, both = operations(build((), 0, False), size[1])
    lines = [
        f"GiB for batches of {options.batch_size} slices of {options.image_size} px, by counted bytes, "
        "without a GPU.",
        "",
        *table((*COLUMNS, "sum"), rows),
        "",
        f"Forward and backward pass with all weights trained: {both / 1e12:.2f} TFLOP an image, "
        f"{(forward + both) / 1e12:.2f} with gradient checkpointing (torch's FlopCounterMode).",
    ]
    report("memory", "Memory of fine-tuning Stable Diffusion", lines, options.results)


if __name__ == "__main__":
    main()
