"""Online evaluation compares features in float32, whatever autocast the training is in."""

import numpy as np
import pytest
import torch
from discs import discs

from adni_ldm.evaluation import online
from adni_ldm.evaluation.classifier import probabilities


class Slices:
    """An ImageSet with the interface of SliceTensors."""

    def __init__(self, images):
        self.images, self.labels = images.images, torch.from_numpy(images.labels)
        self.subjects, self.class_names = images.subjects, images.class_names
        self.arrays, self.conditions = self, {}

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return {"image": self.images[torch.as_tensor(rows), 0].numpy()}


@pytest.fixture
def evaluate(monkeypatch):
    samples = discs(12, seed=2)
    monkeypatch.setattr(online, "generate_image_set", lambda *_args, **_options: samples)
    options = {"max_slices": 40, "count": 12, "classifier_steps": 4}
    sets = (Slices(discs(20, 2, seed=seed)) for seed in (0, 1))
    return online.OnlineEvaluation(*sets, **options, seed=0, device=torch.device("cpu"))


def test_metrics_do_not_depend_on_the_callers_autocast(evaluate):
    expected = evaluate(None)
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(None) == expected
    assert set(expected) == {"kid", "class_accuracy", "copies"}
    assert np.isfinite(list(expected.values())).all()
    assert len(evaluate.train) == 40, "max_slices"


def test_each_comparison_is_in_float32_under_autocast(evaluate):
    """Probabilities, features and distances; the metrics above could hide a small difference."""
    images, classifier = discs(6, seed=3), evaluate.classifier

    def results():
        neighbors = evaluate._nearest(images)
        return probabilities(classifier, images), evaluate.extract(images), neighbors.ratios

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        for found, value in zip(results(), expected):
            np.testing.assert_array_equal(found, value)


def test_the_best_pipeline_is_that_of_the_lowest_kid(tmp_path):
    class Pipeline:
        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)

    def save(step, **metrics):
        return online.save_best(Pipeline(), tmp_path, step, metrics)

    assert save(10, kid=0.5) and not save(20, kid=0.6) and not save(30) and save(40, kid=0.4)
    assert online.read_json(tmp_path / "best/best.json") == {"step": 40, "kid": 0.4}
    assert save(20, kid=0.9), "step 40 belongs to a run that was resumed from an earlier checkpoint"


def test_a_kill_while_the_best_pipeline_is_saved_leaves_the_one_before(tmp_path):
    """A new autoencoder beside the U-Net of before would load without a message."""

    class Pipeline:
        def __init__(self, version):
            self.version = version

        def save_pretrained(self, folder):
            for name in ("vae", "unet"):
                (folder / name).write_text(self.version)
                if self.version == "new":
                    raise KeyboardInterrupt

    online.save_best(Pipeline("old"), tmp_path, 10, {"kid": 0.5})
    with pytest.raises(KeyboardInterrupt):
        online.save_best(Pipeline("new"), tmp_path, 20, {"kid": 0.4})
    assert {(tmp_path / "best" / name).read_text() for name in ("vae", "unet")} == {"old"}
    assert online.read_json(tmp_path / "best/best.json")["step"] == 10
