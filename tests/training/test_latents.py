"""The latent cache: posteriors and statistics are correct, and no stale, partial or damaged file is read."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from torch.utils.data import Dataset

from adni_ldm.data.manifest import CONTENT
from adni_ldm.data.provenance import DataRecord
from adni_ldm.errors import UserError
from adni_ldm.models import build_autoencoder
from adni_ldm.pipeline import denormalize_latents, normalize_latents
from adni_ldm.training import latents as latents_module
from adni_ldm.training import run_record
from adni_ldm.training.batch_sampling import BatchRandom
from adni_ldm.training.latents import (
    LatentPosteriors,
    augment,
    channel_statistics,
    encode_posteriors,
    encode_slices,
)
from adni_ldm.training.run_record import hash_slices


class Slices(Dataset):
    """Random slices that count how often one is read."""

    def __init__(self, count=7):
        self.images = torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.labels = torch.arange(count) % 2
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        return {"image": self.images[index], "label": self.labels[index]}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return build_autoencoder(16, widths=(8, 16))


def drawn(posteriors, count=7):
    """One latent of each slice, from fixed noise."""
    return posteriors[range(count)].sample(BatchRandom(1, 0, count, 0, 1, "cpu"))


def test_every_slice_is_encoded_in_order(vae, accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "CHUNK", 3)
    slices = Slices(7)
    latents = encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    expected = vae.encode(slices.images).latent_dist
    assert torch.allclose(latents.posteriors[0, :, 0], expected.mean, atol=1e-5)
    assert torch.allclose(latents.posteriors[0, :, 1], expected.std, atol=1e-5)
    assert latents.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_drawn_latents_keep_the_posteriors_spread(vae, accelerator, tmp_path):
    """A cached sample would have no spread at all."""
    latents = encode_posteriors(vae, Slices(), accelerator, tmp_path, "slices")
    batch = latents[[3, 5]]
    draws = torch.stack([batch.sample(BatchRandom(0, number, 2, 0, 1, "cpu")) for number in range(1000)])
    std = latents.posteriors[0, [3, 5], 1]
    assert torch.allclose(draws.std(dim=0) / std, torch.ones_like(std), atol=0.15)
    assert (draws.std(dim=0) / std).mean().item() == pytest.approx(1, abs=0.01)


def test_a_second_run_reads_no_slice_and_draws_the_same(vae, accelerator, tmp_path):
    slices = Slices()
    first = encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    slices.reads = 0
    again = encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    assert slices.reads == 0
    assert torch.equal(drawn(first), drawn(again)) and first.sha256 == again.sha256


@pytest.mark.parametrize("change", ["weights", "slices", "variants"])
def test_a_cache_of_something_else_is_not_taken(change, vae, accelerator, tmp_path):
    slices = Slices()
    first = encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    slices.reads = 0
    if change == "weights":
        with torch.no_grad():
            vae.encoder.conv_in.weight[0, 0, 0, 0] += 0.5
    content = "other" if change == "slices" else "slices"
    again = encode_posteriors(vae, slices, accelerator, tmp_path, content, variants=int(change == "variants"))
    assert slices.reads > 0
    if change == "weights":
        assert not torch.equal(drawn(first), drawn(again))


def test_what_is_measured_after_training_makes_no_other_cache(vae, accelerator, tmp_path):
    slices = Slices()
    encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, _trained_on=[{"hash": "x"}])
    slices.reads = 0
    encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    assert slices.reads == 0


@pytest.mark.parametrize("damage", ["truncated", "bit", "record", "missing", "half-written"])
def test_a_damaged_or_half_written_cache_is_made_anew(damage, vae, accelerator, tmp_path):
    slices = Slices()
    whole = drawn(encode_posteriors(vae, slices, accelerator, tmp_path, "slices"))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    file = folder / "posteriors.npy"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-4])
    elif damage == "bit":
        content[-100] ^= 1
        file.write_bytes(content)
    elif damage == "record":
        (folder / "latents.json").write_text((folder / "latents.json").read_text().replace("0,", "1,", 1))
    elif damage == "missing":
        file.unlink()
    else:  # what a kill leaves: some rows, under the other name
        partial = folder.rename(folder.with_name(f"{folder.name}.partial"))
        (partial / "latents.json").unlink()
        (partial / "posteriors.npy").write_bytes(content[:1000])
    slices.reads = 0
    again = encode_posteriors(vae, slices, accelerator, tmp_path, "slices")
    assert slices.reads > 0 and torch.equal(drawn(again), whole)
    assert not list(tmp_path.glob("*.partial")), "nothing is left lying"


def test_the_cache_is_readable_by_its_owner_alone(vae, accelerator, tmp_path):
    encode_posteriors(vae, Slices(), accelerator, tmp_path / "latents", "slices")
    folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
    assert len(folders) == 2 and {path.stat().st_mode & 0o777 for path in folders} == {0o700}


def test_no_run_waits_for_one_that_is_done(vae, accelerator, tmp_path):
    encode_posteriors(vae, Slices(), accelerator, tmp_path, "slices")
    (lock,) = tmp_path.glob("*.lock")
    with FileLock(lock, timeout=0):
        pass


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(vae, accelerator, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--latent_cache .*file"):
        encode_posteriors(vae, Slices(), accelerator, tmp_path / "file" / "cache", "slices")


def test_the_cache_holds_nothing_in_memory_and_cannot_be_written_to(vae, accelerator, tmp_path):
    latents = encode_posteriors(vae, Slices(), accelerator, tmp_path, "slices")
    (file,) = tmp_path.glob("*/posteriors.npy")
    before = file.read_bytes()
    latents.posteriors.zero_()
    assert file.read_bytes() == before
    assert np.load(file, mmap_mode="r").shape == (1, 7, 2, 4, 8, 8)


def test_variants_are_small_changes_by_slice_and_never_flips(vae, accelerator, tmp_path):
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    image = 2 * torch.exp(-((y / 0.5) ** 2) - ((x + 0.2) / 0.3) ** 2) - 1  # a blob left of the middle
    images = image.expand(50, 1, 64, 64)
    varied = augment(images, range(50), variant=1)
    assert torch.equal(varied, augment(images, range(50), 1)), "a function of slice and variant"
    assert not torch.allclose(varied, augment(images, range(50), 2), atol=0.01)
    assert varied.min() >= -1 and varied.max() <= 1
    mass = varied + 1
    centre = (mass * x).sum(dim=(1, 2, 3)) / mass.sum(dim=(1, 2, 3))
    # 3 % of the side is 0.06, and 5 degrees of 0.2 add 0.01 at most across; a flip would be at +0.2
    assert (centre + 0.2).abs().max() < 0.08 and centre.std() > 0.02
    assert 0.85 < mass.amax(dim=(1, 2, 3)).min() / 2 and mass.sum(dim=(1, 2, 3)).std() > 1

    latents = encode_posteriors(vae, Slices(), accelerator, tmp_path, "slices", variants=2)
    assert len(latents.posteriors) == 3
    seen = set()
    for number in range(20):
        rng, again = (BatchRandom(0, number, 2, 0, 1, "cpu") for _ in range(2))
        variants, noise = again.host_integers(3), again.normal(*latents.posteriors.shape[3:])
        mean, std = latents.posteriors[variants, torch.tensor([4, 4])].unbind(1)
        assert torch.equal(latents[[4, 4]].sample(rng), mean + std * noise)
        seen |= set(variants.tolist())
    assert seen == {0, 1, 2}, "the slice itself and both variants"


def test_normalized_latents_have_zero_mean_and_unit_variance():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 5.0]).view(1, 3, 1, 1)
    mean = torch.randn(400, 3, 4, 4, generator=generator) * scale + 3
    posteriors = torch.stack([mean, torch.full_like(mean, 0.2) * scale], dim=1)
    latents = LatentPosteriors(posteriors[None], torch.zeros(400))
    vae = build_autoencoder(16, latent_channels=3, widths=(16, 32))
    with pytest.raises(ValueError, match="latents_mean"):
        normalize_latents(vae, mean)

    channel_mean, channel_std = channel_statistics(posteriors.split(150))
    vae.register_to_config(latents_mean=channel_mean, latents_std=channel_std)
    drawn = latents[range(400)].sample(BatchRandom(0, 0, 400, 0, 1, "cpu"))
    normalized = normalize_latents(vae, drawn)
    assert normalized.mean(dim=(0, 2, 3)).abs().max() < 0.02
    assert (normalized.std(dim=(0, 2, 3)) - 1).abs().max() < 0.02
    assert torch.allclose(denormalize_latents(vae, normalized), drawn, atol=1e-5)


def test_statistics_of_a_stream_are_those_of_the_whole(vae, accelerator):
    batches = list(encode_slices(vae, Slices(40), accelerator))
    assert len(batches) > 1
    mean, std = torch.cat(batches).double().unbind(1)
    variance = mean.var(dim=(0, 2, 3), correction=0) + std.square().mean(dim=(0, 2, 3))
    found = channel_statistics(batches)
    assert found[0] == pytest.approx(mean.mean(dim=(0, 2, 3)).tolist(), rel=1e-6)
    assert found[1] == pytest.approx(variance.sqrt().tolist(), rel=1e-6)


def test_encoding_with_a_vae_in_training_keeps_no_graph_of_the_slices(vae, accelerator):
    vae.requires_grad_(True)
    assert not any(batch.requires_grad for batch in encode_slices(vae, Slices(), accelerator))


def test_slices_with_a_manifest_are_known_without_their_pixels(accelerator, monkeypatch):
    """Slices has no `arrays` to read pixels of: without a manifest they would be requested."""
    record = {"class_names": ("AD", "NC"), "subjects_known": True, "subjects": {"train": {"a": {"1"}}}}
    known = DataRecord(hash="1" * 64, hash_of=CONTENT, **record)
    found = hash_slices(accelerator, known, 16, train=Slices())
    assert found == hash_slices(accelerator, known, 16, train=Slices())
    assert found != hash_slices(accelerator, known, 32, train=Slices())
    assert found != hash_slices(accelerator, DataRecord("2" * 64, CONTENT, **record), 16, train=Slices())
    with pytest.raises(AttributeError, match="arrays"):
        hash_slices(accelerator, DataRecord("1" * 64, "names and sizes", **record), 16, train=Slices())
    monkeypatch.setattr(run_record, "PREPARATION_VERSION", run_record.PREPARATION_VERSION + 1)
    assert found != hash_slices(accelerator, known, 16, train=Slices()), "prepared otherwise"
