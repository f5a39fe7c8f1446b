"""Small slices of visible class: a bright disc with a dark hole, wide in AD and narrow in NC."""

import numpy as np
import torch

from adni_ldm.evaluation.image_sets import ImageSet


def discs(subjects, slices=1, seed=0, size=32, holes=(0.22, 0.10), classes=("AD", "NC")):
    """`subjects` of each class, `slices` of each, alike within a subject; `holes` as a share of the side."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5
    images, labels, names = [], [], []
    for index in range(subjects * len(classes)):
        label = index % len(classes)
        radius, hole, shift = rng.normal(0.38, 0.02), rng.normal(holes[label], 0.01), rng.normal(0, 0.03, 2)
        for _ in range(slices):
            distance = np.hypot(y - shift[0], x - shift[1])
            inside = np.clip((radius - distance) * size, 0, 1) * np.clip((distance - hole) * size, 0, 1)
            images.append(np.clip(200 * inside + rng.normal(0, 8, (size, size)), 0, 255))
            labels.append(label)
            names.append(f"{seed}-{index}")
    pixels = torch.from_numpy(np.array(images).astype(np.uint8))[:, None]
    return ImageSet(pixels, np.array(labels), np.array(names), classes)
