"""A small part of the report while a model trains: is it still getting better, and is it copying by now?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from adni_ldm.evaluation.classifier import train_classifier
from adni_ldm.evaluation.conditioning import agreement
from adni_ldm.evaluation.features import load_extractor
from adni_ldm.evaluation.fidelity import kernel_distance
from adni_ldm.evaluation.image_sets import ImageSet, generate_image_set
from adni_ldm.evaluation.nearest_neighbors import nearest_in_pixels
from adni_ldm.evaluation.privacy import copy_figures
from adni_ldm.pipeline import ClassConditionalLDMPipeline

BEST = "best"  # folder of the best pipeline so far, beside the checkpoints


class OnlineEvaluation:
    """KID, agreement with the class, and copies, of `count` samples of each class.

    One process alone needs it. Nothing of the training's random state is touched.

    Args:
        train: slices that the model is trained on.
        held_out: slices of other subjects.
        steps: DDIM steps of the samples.
    """

    def __init__(
        self,
        train: ImageSet,
        held_out: ImageSet,
        *,
        count: int,
        classifier_steps: int,
        steps: int,
        guidance_scale: float,
        seed: int,
        device: torch.device,
    ):
        self.train, self.held_out, self.count, self.seed = train, held_out, count, seed
        self.options = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        self.judge = train_classifier(
            train, seed=seed, device=device, steps=classifier_steps, description="classifier that judges"
        )
        self.extract = load_extractor("classifier", classifier=self.judge, device=device)
        self.features = self.extract(held_out)
        self.distances = nearest_in_pixels(held_out.images, train.images, train.subjects)

    def __call__(self, pipeline: ClassConditionalLDMPipeline) -> dict[str, float]:
        """{"kid": …, "agreement": …, "copies": …}, without those that cannot be told."""
        samples = generate_image_set(pipeline, self.count, self.seed, **self.options)
        sets = (self.features, self.extract(samples), self.held_out.subjects, samples.subjects)
        near = nearest_in_pixels(samples.images, self.train.images, self.train.subjects)
        copies, _ = copy_figures(near, samples, self.distances, self.held_out, self.train)
        figures = {
            "kid": kernel_distance(*sets, draws=0),
            "agreement": agreement(self.judge, samples, self.held_out)["all"],
            "copies": copies["copies"],
        }
        return {name: one.value for name, one in figures.items() if one.value is not None}


def save_best(
    pipeline: ClassConditionalLDMPipeline, output_dir: Path, step: int, figures: dict[str, float]
) -> bool:
    """Save the pipeline as output_dir/best if its KID is the lowest so far; best/best.json says what it has.

    A best of a later step belongs to a run that was gone back on, and counts for nothing.
    """
    record = output_dir / BEST / "best.json"
    earlier = json.loads(record.read_text()) if record.is_file() else None
    if "kid" not in figures or (earlier and earlier["step"] < step and earlier["kid"] <= figures["kid"]):
        return False
    record.unlink(missing_ok=True)  # until all is written there is no best
    pipeline.save_pretrained(output_dir / BEST)
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps({"step": step, **figures}, indent=1) + "\n")
    os.replace(partial, record)
    return True
