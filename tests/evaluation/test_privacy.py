"""Memorization: planted copies are found, new subjects are not; membership inference."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy import ndimage

from adni_ldm.data.slices import load_slices
from adni_ldm.errors import UserError
from adni_ldm.evaluation.image_sets import ImageSet, real_set
from adni_ldm.evaluation.model_outputs import bottleneck_features, denoising_losses, reconstruct
from adni_ldm.evaluation.nearest_neighbors import Neighbors, nearest_in_pixels
from adni_ldm.evaluation.privacy import (
    calibrate,
    copy_metrics,
    cross_validated_false_positives,
    measure_memorization,
    membership_auc,
    nearest_pairs,
)
from adni_ldm.models import ClassEmbedding, build_autoencoder, build_denoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline, normalize_latents
from adni_ldm.preprocessing.phantom import write_phantom_cohort

SIZE = 48


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """64 phantom subjects of 4 slices: 30 for training, 20 for calibration, 14 new."""
    folder = tmp_path_factory.mktemp("privacy") / "cohort"
    write_phantom_cohort(folder, subjects=64, slices=4, image_size=SIZE, seed=3, workers=1)
    splits = [real_set(split, SIZE) for split in load_slices(folder).values()]
    everyone = join(*splits)
    order = np.unique(everyone.subjects)
    groups = np.split(order, [30, 50])
    return [everyone.take(np.isin(everyone.subjects, group)) for group in groups]


def join(*sets):
    return ImageSet(
        torch.cat([one.images for one in sets]),
        np.concatenate([one.labels for one in sets]),
        np.concatenate([one.subjects for one in sets]),
        sets[0].class_names,
    )


def with_images(images, pixels):
    return dataclasses.replace(
        images, images=torch.from_numpy(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    )


def constant(images, value=128):
    return dataclasses.replace(images, images=torch.full_like(images.images, value))


def plant(images, kind):
    """The slices as a memorizing model might generate them."""
    rng = np.random.default_rng(0)
    pixels = images.images.numpy().astype(float)

    def each(change):
        return np.stack([change(one[0])[None] for one in pixels])

    planted = {
        "exact": lambda: pixels,
        "shifted": lambda: each(lambda x: ndimage.shift(x, rng.choice([-1, 1], 2) * rng.integers(1, 4, 2))),
        "half a pixel": lambda: each(lambda x: ndimage.shift(x, rng.uniform(-3, 3, 2), order=1)),
        "rotated": lambda: each(lambda x: ndimage.rotate(x, rng.choice([-5, 5]), reshape=False, order=1)),
        "brighter": lambda: 1.25 * pixels + 15,
        "darker": lambda: 0.6 * pixels,
        "gamma": lambda: each(lambda x: 255 * (x / 255) ** rng.uniform(0.65, 1.5)),
        "shaded": lambda: pixels * np.linspace(0.6, 1.1, SIZE)[:, None] * np.linspace(1.1, 0.6, SIZE),
        "noisy": lambda: pixels + rng.normal(0, 12, pixels.shape),
        "very noisy": lambda: pixels + rng.normal(0, 24, pixels.shape),
        "blurred": lambda: ndimage.gaussian_filter(pixels, (0, 0, 0.8, 0.8)),
        "all of it": lambda: (
            each(lambda x: ndimage.gaussian_filter(ndimage.shift(0.8 * x, rng.integers(-2, 3, 2)), 0.6))
            + rng.normal(0, 5, pixels.shape)
        ),
    }[kind]()
    return with_images(images, planted)


KINDS = (
    "exact",
    "shifted",
    "half a pixel",
    "rotated",
    "brighter",
    "darker",
    "gamma",
    "shaded",
    "noisy",
    "very noisy",
    "blurred",
    "all of it",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_planted_copy_is_found(cohort, kind):
    """12 copies among 36 slices of new subjects: each is found, with its training slice."""
    train, held_out, new = cohort
    originals = np.arange(3, 120, 10)
    copies = plant(train.take(originals), kind)
    samples = join(new.take(np.arange(36)), copies)
    found = measure_memorization(samples, train, held_out)
    called = found.rule.is_copy(found.samples.ratios)
    assert called[36:].all(), f"missed: {originals[~called[36:]]}, ratios {found.samples.ratios[36:]}"
    assert (found.samples.rows[36:] == originals).all()
    assert found.metrics["copies"].value >= 12 / 48
    assert found.metrics["copies"].low > found.metrics["copies"].reference
    assert all(pair.is_copy and pair.sample >= 36 for pair in found.pairs)


def test_new_subjects_are_classified_as_copies_no_more_often_than_stated(cohort):
    train, held_out, new = cohort
    found = measure_memorization(new, train, held_out)
    assert found.rule.false_positive_rate == pytest.approx(1 / 81), "80 held-out slices allow no less"
    assert found.rule.subjects == 20
    assert found.metrics["copies"].low <= found.rule.false_positive_rate
    assert found.metrics["copies"].value <= 2 / 56  # three or more: p = 0.03
    assert found.metrics["copies"].reference <= 2 / 80


def test_the_stated_rate_holds_over_many_cohorts():
    rng = np.random.default_rng(0)
    for count, rate in ((50, 1 / 51), (99, 0.01), (300, 0.01)):
        rates = []
        for _ in range(2000):
            rule = calibrate(rng.normal(size=count), np.arange(count))
            rates.append(rule.is_copy(rng.normal(size=500)).mean())
        assert rule.false_positive_rate == pytest.approx(rate)
        assert np.mean(rates) == pytest.approx(rate, rel=0.1) or np.mean(rates) < rate


def test_the_false_positive_rate_of_a_subject_is_calibrated_on_the_others():
    """A held-out subject near the training set would otherwise set the threshold itself."""
    ratios, subjects = np.linspace(0.6, 0.9, 400), np.repeat(np.arange(40), 10)
    ratios[:10] = 0.3
    called = cross_validated_false_positives(ratios, subjects)
    assert called[:10].all() and called[10:].sum() <= 1
    assert not calibrate(ratios, subjects).is_copy(ratios).any(), (
        "with its own slices in the calibration it is not found"
    )


def test_the_shares_of_copies_by_class_and_of_copied_subjects(cohort):
    """All AD samples and no NC sample are copies, of three of 30 subjects."""
    train, held_out, _ = cohort
    shifts = np.zeros((80, 2), int)
    near = Neighbors(np.array([0, 1, 5, 9, 9, 9]), np.ones(6), np.repeat([0.1, 0.9], 3), shifts[:6])
    samples = ImageSet(train.images[:6], np.array([0, 0, 0, 1, 1, 1]), np.arange(6).astype(str), ("AD", "NC"))
    others = Neighbors(np.zeros(80, int), np.ones(80), np.where(np.arange(80) == 7, 0.6, 0.9), shifts)
    figures, rule = copy_metrics(near, samples, others, held_out, train)
    assert rule.threshold == 0.6
    assert figures["copies"].value == 0.5 and figures["copies"].reference == 1 / 80
    assert figures["copies_AD"].value == 1 and figures["copies_NC"].value == 0
    assert figures["copies_AD"].low == pytest.approx(0.4385, abs=1e-3), "Wilson's interval of 3 of 3"
    copied = len(set(train.subjects[[0, 1, 5]]))
    assert figures["subjects_copied"].value == pytest.approx(copied / 30)


def gap(samples, train, held_out):
    figures = measure_memorization(samples, train, held_out).metrics
    json.dumps({name: figure.to_json() for name, figure in figures.items()}, allow_nan=False)
    return figures["copies"]


def test_insufficient_data_give_no_value_but_the_reason(cohort):
    train, held_out, new = cohort
    one = train.take(train.subjects == train.subjects[0])
    assert "of one subject" in gap(new, one, held_out).note
    alone = held_out.take(held_out.subjects == held_out.subjects[0])
    assert "1 held-out subjects" in gap(new, train, alone).note
    assert "0 held-out subjects" in gap(new, train, held_out.take([])).note
    assert "8 held-out slices" in gap(new, train, held_out.take(slice(8))).note
    assert "identical to training slices" in gap(new, train, join(held_out, train.take(slice(8)))).note
    assert gap(new.take([]), train, held_out).note == "no samples"
    figures = measure_memorization(new.of_class("AD"), train, held_out).metrics
    assert figures["copies_NC"].note == "no samples of NC" and figures["copies_AD"].value is not None
    assert "at least 10 of each" in membership_auc(np.ones(9), np.arange(9), np.ones(3), np.arange(3)).note


def test_constant_and_identical_slices_are_not_copies(cohort):
    train, held_out, new = cohort
    assert gap(constant(new), train, held_out).value == 0
    assert gap(constant(new, 0), train, held_out).value == 0
    for value in (1, 77, 255):
        assert gap(*(constant(one, value) for one in cohort)).value == 0
    same = dataclasses.replace(new, images=new.images[:1].expand_as(new.images))
    assert gap(same, train, held_out).value in (0, 1)
    alike = [dataclasses.replace(one, images=train.images[:1].expand_as(one.images)) for one in cohort]
    assert gap(*alike).value == 0, "a slice that all subjects share is a copy of none"


def test_pairs_have_the_training_slice_and_number_the_subjects(cohort):
    train, held_out, _ = cohort
    samples = plant(train.take([8, 9, 50]), "exact")
    found = measure_memorization(samples, train, held_out)
    pairs = nearest_pairs(found.samples, samples, train, found.rule, count=3)
    assert [(pair.training, pair.subject) for pair in pairs] == [
        (row, train.subjects[row]) for row in (8, 9, 50)
    ]
    places = [list(np.flatnonzero(train.subjects == pair.subject)).index(pair.training) + 1 for pair in pairs]
    assert [pair.slice_number for pair in pairs] == places
    numbers = {pair.subject: pair.subject_number for pair in pairs}
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))


def test_the_shift_of_a_pair_aligns_the_slices(cohort):
    train, _, _ = cohort
    moved = train.images[:6].roll((2, -3), (2, 3))
    found = nearest_in_pixels(moved, train.images, train.subjects)
    assert (found.shifts == [2, -3]).all() and (found.rows == np.arange(6)).all()


# ---- Membership inference ----------------------------------------------------------------------------------


@pytest.fixture
def pipeline():
    torch.manual_seed(0)
    vae = build_autoencoder(SIZE, widths=(8, 16)).eval()
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[0.5] * 4)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    unet = build_denoiser(4, SIZE // 2, widths=(32, 64), token_dim=8).eval()
    return ClassConditionalLDMPipeline(vae, unet, ClassEmbedding(token_dim=8), scheduler)


class Memorizing(torch.nn.Module):
    """Predicts the nearest training latent for every noisy latent."""

    def __init__(self, pipeline, images):
        super().__init__()
        self.config, self.dtype = pipeline.unet.config, torch.float32
        self.alphas = pipeline.scheduler.alphas_cumprod
        self.epsilon = pipeline.scheduler.config.prediction_type == "epsilon"
        with torch.no_grad():
            posterior = pipeline.vae.encode(images.floats()).latent_dist
        self.known = normalize_latents(pipeline.vae, posterior.mode())

    def forward(self, noisy, timestep, tokens):
        alpha = self.alphas[timestep[0]]
        nearest = torch.cdist(noisy.flatten(1), alpha.sqrt() * self.known.flatten(1)).argmin(1)
        clean = self.known[nearest]
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        prediction = noise if self.epsilon else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        return type("Output", (), {"sample": prediction})


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_membership_inference_detects_a_memorizing_model(cohort, pipeline, prediction_type):
    train, held_out, _ = cohort
    pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    pipeline.register_modules(unet=Memorizing(pipeline, train))
    losses = denoising_losses(pipeline, train)
    assert losses.shape == (120,) and losses.max() < 1e-6, "it denoises training latents without error"
    found = membership_auc(losses, train.subjects, denoising_losses(pipeline, held_out), held_out.subjects)
    assert found.value > 0.99 and found.low > 0.95 and found.reference == 0.5


def test_membership_inference_is_at_chance_for_an_untrained_model(cohort, pipeline):
    train, held_out, _ = cohort
    found = measure_memorization(held_out.take(slice(4)), train, held_out, pipeline=pipeline, most=60)
    auc = found.metrics["membership_auc"]
    assert auc.low < 0.5 < auc.high
    assert 0.3 < auc.value < 0.7


def test_losses_and_bottleneck_do_not_depend_on_the_batch(cohort, pipeline):
    some = cohort[0].take(slice(7))
    for compute in (denoising_losses, bottleneck_features):
        once, again = compute(pipeline, some, batch_size=7), compute(pipeline, some, batch_size=3)
        assert np.allclose(once, again, atol=1e-4) and np.isfinite(once).all()
        assert len(np.unique(once.round(6), axis=0)) == 7
    assert bottleneck_features(pipeline, some).shape == (7, 64 * 12 * 12)
    assert not pipeline.unet.mid_block._forward_hooks, "the hook is removed"
    assert reconstruct(pipeline.vae, some).shape == some.images.shape


def test_a_model_of_another_size_is_rejected(cohort, pipeline):
    small = dataclasses.replace(cohort[0], images=cohort[0].images[..., :32, :32])
    with pytest.raises(UserError, match="32 pixels, but the model generates 48"):
        denoising_losses(pipeline, small)
