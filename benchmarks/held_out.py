"""Metrics of samples against held-out slices, in features that no method was trained with, on, or for."""

from __future__ import annotations

from pathlib import Path

from measure import DEVICE

import numpy as np  # isort: skip
import pandas as pd
import torch
from torchvision.models import vgg16

from adni_ldm.data.slices import load_slices
from adni_ldm.evaluation.anatomy import measure_anatomy, ventricle_area
from adni_ldm.evaluation.effects import cohens_d
from adni_ldm.evaluation.estimates import Estimate
from adni_ldm.evaluation.fidelity import kernel_distance, manifold_metrics
from adni_ldm.evaluation.image_sets import real_set
from adni_ldm.evaluation.spectrum import band_power

FEATURES = (
    "features are those of a VGG16 with random weights of a fixed seed (Naeem et al. 2020, "
    "arXiv:2002.09797): no method was trained with, on, or for them, and they need no download."
)


def random_features(images: torch.Tensor) -> np.ndarray:
    """Compute features (N, 4096) of slices (N, 1, H, W) in [-1, 1] by a VGG16 with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = vgg16(weights=None).eval().to(DEVICE)
    network.classifier = network.classifier[:5]
    with torch.no_grad():
        parts = [network(part.to(DEVICE).expand(-1, 3, -1, -1)).float().cpu() for part in images.split(64)]
    return torch.cat(parts).numpy()


class HeldOutMetrics:
    """Metrics against the test split of a cohort.

    `others`, `count` of the training slices, define the scale of the features, and in the samples' place the
    reference value of each metric. `fresh` is another cohort whose training subjects, who are more, take the
    place of the test split.
    """

    def __init__(self, cohort: Path, image_size: int, count: int, fresh: Path | None = None):
        splits = load_slices(cohort)
        self.train = real_set(splits["train"], image_size)
        held_out = load_slices(fresh)["train"] if fresh else splits["test"]
        self.held_out = real_set(held_out, image_size)
        self.pixel_mm = pd.read_csv(cohort / "test/metadata.csv").pixel_mm[0]
        order = np.random.default_rng(0).permutation(len(self.train))
        self.others = self.train.take(np.sort(order[:count]))
        features = random_features(self.others.floats())
        # mean 0 and mean square 1: features of a random network have no scale of their own
        self.centre, self.scale = features.mean(0), features.std()
        self.real = self.standardize(random_features(self.held_out.floats()))

    def standardize(self, features: np.ndarray) -> np.ndarray:
        return (features - self.centre) / self.scale

    def compare(self, images: torch.Tensor, subjects: np.ndarray) -> dict[str, Estimate]:
        """Compute KID, precision and recall of slices (N, 1, H, W) in [-1, 1], with 95 % intervals."""
        features = self.standardize(random_features(images))
        sets = self.real, features, self.held_out.subjects, subjects
        return {"kid": kernel_distance(*sets, draws=200), **manifold_metrics(*sets, draws=200)}

    def cells(self, images: torch.Tensor, subjects: np.ndarray, labels: np.ndarray) -> tuple[str, ...]:
        """Format KID × 1000 with its interval, precision, recall, and AD − NC of the ventricle area, mm²."""
        found = self.compare(images, subjects)
        manifold = (f"{found[name].value:.2f}" for name in ("precision", "recall"))
        return format_kid(found["kid"]), *manifold, f"{self.ventricle_difference(images, labels):.0f}"

    def spread(self, images: torch.Tensor, labels: np.ndarray) -> tuple[str, ...]:
        """Cells of what is ÷ that of held-out slices: the SD within each class of ventricle, brain and
        intensity, Cohen's d of the ventricle, and power by frequency band."""
        if not hasattr(self, "_measured"):
            real = self.held_out.floats()
            self._measured = measure_anatomy(real, self.pixel_mm), band_power(real)
        real, real_power = self._measured
        sides = (measure_anatomy(images, self.pixel_mm), labels), (real, self.held_out.labels)
        cells = []
        for name in ("ventricle_mm2", "brain_mm2", "intensity"):
            found, expected = ([one[name][classes == k].std() for k in (0, 1)] for one, classes in sides)
            cells.append(", ".join(f"{ratio:.2f}" for ratio in np.divide(found, expected)))
        effects = []
        for one, classes in sides:
            ad, nc = (one["ventricle_mm2"][classes == k] for k in (0, 1))
            effects.append(cohens_d((ad.mean(), ad.std()), (nc.mean(), nc.std())))
        power = (value.mean() / real_power[band].mean() for band, value in band_power(images).items())
        return *cells, f"{effects[0] / effects[1]:.2f}", ", ".join(f"{value:.2f}" for value in power)

    def reference(self) -> tuple[str, ...]:
        """The same cells of training slices in the samples' place."""
        return self.cells(self.others.floats(), self.others.subjects, self.others.labels)

    def truth(self) -> float:
        """AD − NC of the lateral ventricle of the held-out slices, by the same segmentation, mm²."""
        return self.ventricle_difference(self.held_out.floats(), self.held_out.labels)

    def ventricle_difference(self, images: torch.Tensor, labels: np.ndarray) -> float:
        areas = ventricle_area(images, self.pixel_mm)
        return areas[labels == 0].mean() - areas[labels == 1].mean()


def format_kid(estimate: Estimate) -> str:
    """Format value and interval, times 1000 as KID is usually reported."""
    value, low, high = (1000 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"
