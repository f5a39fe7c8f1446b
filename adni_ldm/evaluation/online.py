"""Online evaluation: a small part of the report during training, and the pipeline with the lowest KID."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from adni_ldm.errors import UserError

if find_spec("scipy") is None:
    raise UserError("--evaluation_steps: scipy is not installed: pip install 'adni-ldm[eval]'")

from adni_ldm.data.slices import SliceTensors
from adni_ldm.evaluation.classifier import train_classifier
from adni_ldm.evaluation.conditioning import class_conditioning_accuracy
from adni_ldm.evaluation.features import load_extractor
from adni_ldm.evaluation.fidelity import kernel_distance
from adni_ldm.evaluation.image_sets import ImageSet, generate_image_set, image_set
from adni_ldm.evaluation.nearest_neighbors import Neighbors, nearest_in_pixels
from adni_ldm.evaluation.privacy import copy_metrics
from adni_ldm.files import atomic_folder, read_json, write_json
from adni_ldm.pipeline import ClassConditionalLDMPipeline

BEST = "best"  # folder of the best pipeline so far, beside the checkpoints


class OnlineEvaluation:
    """KID, class-conditioning accuracy and share of copies, of `count` samples of each class.

    Samples are generated with the pipeline's own sampling settings.

    Needed in one process only. Leaves the random state of the training as it is. Samples are generated under
    the caller's autocast; what is compared is computed in float32.

    Args:
        train: slices that the model is trained on.
        held_out: slices of other subjects.
        max_slices: use about this many of either, the same share of every subject's.
    """

    def __init__(
        self,
        train: SliceTensors,
        held_out: SliceTensors,
        *,
        max_slices: int,
        count: int,
        classifier_steps: int,
        seed: int,
        device: torch.device,
    ):
        self.train, self.held_out = (image_set(part, max_slices, seed) for part in (train, held_out))
        self.count, self.seed = count, seed
        title = "training the classifier for evaluation"
        self.classifier = train_classifier(
            self.train, seed=seed, device=device, steps=classifier_steps, description=title
        )
        self.extract = load_extractor("classifier", classifier=self.classifier, device=device)
        self.features = self.extract(self.held_out)
        self.held_out_neighbors = self._nearest(self.held_out)

    def __call__(self, pipeline: ClassConditionalLDMPipeline) -> dict[str, float]:
        """{"kid": …, "class_accuracy": …, "copies": …}, without those that cannot be estimated."""
        samples = generate_image_set(pipeline, self.count, self.seed)
        neighbors = self._nearest(samples)
        copies, _ = copy_metrics(neighbors, samples, self.held_out_neighbors, self.held_out, self.train)
        sets = (self.features, self.extract(samples), self.held_out.subjects, samples.subjects)
        estimates = {
            "kid": kernel_distance(*sets, draws=0),
            "class_accuracy": class_conditioning_accuracy(self.classifier, samples, self.held_out)["all"],
            "copies": copies["copies"],
        }
        return {name: estimate.value for name, estimate in estimates.items() if estimate.value is not None}

    def _nearest(self, images: ImageSet) -> Neighbors:
        return nearest_in_pixels(images.images, self.train.images, self.train.subjects)


def save_best(
    pipeline: ClassConditionalLDMPipeline, output_dir: Path, step: int, metrics: dict[str, float]
) -> bool:
    """Save the pipeline as output_dir/best if its KID is the lowest so far; its metrics go to best/best.json.

    A best of a later step belongs to a run that was resumed from an earlier checkpoint, and is overwritten.
    """
    record = output_dir / BEST / "best.json"
    earlier = read_json(record) if record.is_file() else None
    if "kid" not in metrics or (earlier and earlier["step"] < step and earlier["kid"] <= metrics["kid"]):
        return False
    with atomic_folder(output_dir / BEST) as folder:
        pipeline.save_pretrained(folder)
        write_json(folder / record.name, {"step": step, **metrics})
    return True
