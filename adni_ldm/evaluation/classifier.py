"""A slice classifier by diagnosis, for class-conditioning accuracy, features and TSTR."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from tqdm import tqdm

from adni_ldm.errors import UserError
from adni_ldm.evaluation.image_sets import ImageSet
from adni_ldm.precision import has_bf16

STEPS = 200  # batches of 64 slices; 300 are no more accurate on the phantom's test subjects at 64 px


def build_classifier(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-18 (He et al. 2016) from slices (B, 1, H, W) in [-1, 1] to logits (B, num_classes).

    Below 128 pixels the first kernel is 3 x 3 instead of 7 x 7 and the last stage is omitted: at 64 pixels
    its feature map would be 2 x 2, with three quarters of the weights and three fifths of the time.
    """
    model = resnet18(num_classes=num_classes)
    small = image_size < 128
    kernel = 3 if small else 7
    model.conv1 = nn.Conv2d(1, 64, kernel, stride=2, padding=kernel // 2, bias=False)
    if small:
        model.layer4 = nn.Identity()
        model.fc = nn.Linear(256, num_classes)
    return model


def train_classifier(
    train: ImageSet,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = STEPS,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    description: str = "Training a classifier",
) -> nn.Module:
    """Train `build_classifier` on a set; returned in eval mode on `device`, deterministic on the CPU.

    Batches are class-balanced. The number of steps is fixed, so the time does not grow with the set. AdamW
    with a one-cycle learning rate (Smith & Topin 2018).

    Raises:
        UserError: the set has fewer than two classes.
    """
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    if (counts > 0).sum() < 2:
        present = [name for name, count in zip(train.class_names, counts) if count]
        raise UserError(f"classes present: {', '.join(present) or 'none'}; a classifier needs at least two")
    weights = torch.from_numpy(1 / counts[train.labels])  # (N,), of equal sum in every class
    labels = torch.from_numpy(train.labels).to(device)

    def loss_of(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels[rows.to(device)])

    outputs = len(train.class_names)
    options = {"device": device, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    return fit_network(train, outputs, loss_of, weights, seed=seed, description=description, **options)


def fit_network(
    train: ImageSet,
    outputs: int,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    weights: torch.Tensor,
    *,
    seed: int,
    device: str | torch.device,
    steps: int,
    description: str,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> nn.Module:
    """Train `build_classifier` of so many outputs, as `train_classifier` says.

    Args:
        loss_of: the loss () of outputs (B, outputs), float32, on the rows (B,) of the set.
        weights: (N,), in proportion to which rows are drawn.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_classifier(outputs, train.images.shape[-1])
        model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)

    model.train()
    for _ in tqdm(range(steps), desc=description, leave=False):
        rows = torch.multinomial(weights, batch_size, replacement=True, generator=generator)
        images = augment(train.floats(rows), generator).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bf16()):
            logits = model(images.contiguous(memory_format=torch.channels_last))  # (B, outputs)
        loss = loss_of(logits.float(), rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Slices (B, 1, H, W) in [-1, 1], each shifted by up to 1/16 of its side in whole pixels and scaled in
    brightness by 0.9 to 1.1. No flips: left-right and front-back are anatomy."""
    count, _, height, width = images.shape
    reach = height // 16
    down, right = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + down).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + right).clamp(0, width - 1)  # (B, W)
    moved = images[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]]
    gain = 0.9 + 0.2 * torch.rand((count, 1, 1), generator=generator)
    return ((moved + 1) * gain - 1).clamp(-1, 1)[:, None]


def probabilities(model: nn.Module, images: ImageSet, batch_size: int = 256) -> np.ndarray:
    """Probability of each class for each slice, (N, K) float32, in the order of `class_names`."""
    return outputs_of(model, images, batch_size).softmax(dim=1).numpy()


@torch.no_grad()
def outputs_of(model: nn.Module, images: ImageSet, batch_size: int = 256) -> torch.Tensor:
    """Outputs (N, outputs) float32 on the CPU, computed in float32 regardless of the caller's autocast."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, enabled=False):
        logits = [
            model(images.floats(slice(first, first + batch_size)).to(device)).cpu()
            for first in range(0, len(images), batch_size)
        ]
    return torch.cat(logits)
