"""The benchmarks run at the smallest sizes and print the tables that they describe."""

import json
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import baselines  # noqa: E402
import end_to_end  # noqa: E402
import measure  # noqa: E402
import memory  # noqa: E402
import plain_loop  # noqa: E402
import scaling  # noqa: E402
import throughput  # noqa: E402
from baseline_monai import build_autoencoder, train_monai  # noqa: E402
from baseline_small import train_small  # noqa: E402
from baseline_training import Trained, batches  # noqa: E402
from held_out import HeldOutMetrics  # noqa: E402
from phantoms import read_test_set, render_again  # noqa: E402

from adni_ldm.data.slices import load_slices  # noqa: E402
from adni_ldm.evaluation.image_sets import real_set  # noqa: E402


@pytest.fixture(scope="module")
def bench(phantom_dir, tmp_path_factory):
    """The Bench of throughput.py on the tests' cohort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "make_cohort", lambda *_args, **_options: phantom_dir)
        # without hardware support a bfloat16 product of the full size takes a minute
        patch.setattr(throughput, "matmul_peak", partial(measure.matmul_peak, rounds=1, sides=[64]))
        options = Namespace(steps=4, rounds=1, sampling_steps=2, compile=False)
        work = tmp_path_factory.mktemp("bench") / "tiny"
        return throughput.Bench(work, measure.Preset.load("tiny"), options)


@pytest.fixture(scope="module")
def splits(phantom_dir):
    loaded = load_slices(phantom_dir)
    return [real_set(loaded[name], 32) for name in ("train", "test")]


def test_recipe_is_profiled_unchanged(bench):
    bench.vae_step()
    name, images, gflop, share, memory = bench.rows[-1]
    assert "train_vae.py" in name and float(images) > 0 and float(gflop) > 0 and float(memory) > 0.1
    assert share.endswith("%")


def test_sampling_and_encoding_have_rows(bench):
    note = bench.sampling()[0]
    assert "more time than its U-Net calls alone" in note
    bench.encoding()
    assert float(bench.rows[-1][1]) > 0 and "encoding" in bench.rows[-1][0]


def test_counted_flops_of_a_convolution(bench):
    """One convolution of 4 to 8 channels, 3 x 3, over 16 x 16 pixels."""
    convolution, images = torch.nn.Conv2d(4, 8, 3, padding=1), torch.randn(1, 4, 16, 16)
    assert bench.count(lambda: convolution(images)) == 2 * 4 * 8 * 9 * 16 * 16


def test_plain_loop_trains_the_same_networks(bench, tmp_path, monkeypatch):
    settings = {"data_dir": bench.data, "vae": bench.work / "vae", "image_size": 32, "batch_size": 2}
    settings |= {"layers_per_block": 1, "max_steps": 4, "unet_widths": [32, 64]}
    arguments = ["plain_loop.py", str(tmp_path / "out.json"), *measure.flags(settings)]
    monkeypatch.setattr(sys, "argv", arguments)
    plain_loop.main()
    assert json.loads((tmp_path / "out.json").read_text())["steps_per_second"] > 0


@pytest.mark.parametrize("name", ["small", "monai"])
def test_baseline_stops_in_time_and_generates(name, splits):
    train, held_out = splits
    preset = measure.Preset("small", 32, {"widths": [8, 16]}, {"unet_widths": [32, 64]})
    trained = train_small(train, 1.0) if name == "small" else train_monai(train, 1.0, preset, True, 4)
    assert trained.seconds < 6, "the current step is finished, and no other is started"
    with torch.no_grad():
        assert trained.reconstruct(held_out.floats()).shape == held_out.images.shape
    samples = trained.sample(torch.tensor([0, 1, 0]))
    assert samples.shape == (3, 1, 32, 32) and samples.isfinite().all()


@pytest.mark.parametrize("name", ["demo", "adni"])
def test_networks_of_a_preset_are_those_that_it_trains(name):
    preset = measure.Preset.load(name)
    vae, denoiser = preset.build_vae(), preset.build_denoiser()
    side = preset.image_size // preset.vae.get("patch_size", 1) // 2 ** (len(preset.vae["widths"]) - 1)
    with torch.device("meta"):
        slices = torch.zeros(1, 1, preset.image_size, preset.image_size)
    latents = vae.to("meta").encode(slices).latent_dist.mean.shape[1:]
    assert latents == (denoiser.unet.config.in_channels, side, side)
    assert denoiser.unet.config.sample_size == side
    attention = sum("Cross" in block for block in denoiser.unet.config.down_block_types)
    assert attention == preset.ldm.get("attention_levels", len(preset.ldm["unet_widths"]) - 1)
    peer = build_autoencoder(preset, False, 1).to("meta")
    assert peer.encode(slices)[0].shape[2:] == latents[1:], "a peer's latents are as large"


def test_no_time_left_gives_no_batches(splits):
    assert not list(batches(splits[0], 4, -1.0)), "an autoencoder that overran leaves less than no time"


def test_method_is_evaluated_against_held_out_slices(phantom_dir):
    metrics = HeldOutMetrics(phantom_dir, image_size=32, count=100)
    train = metrics.train
    rows = torch.arange(64) % len(train)
    noise = torch.rand(64, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kid = {}
    for name, images in {"copier": train.floats(rows), "noise": noise}.items():
        method = Trained(lambda images: images, lambda labels, images=images: images[: len(labels)], 1.0, "")
        row, samples = baselines.evaluate(name, method, metrics, 12)
        assert len(row) == len(baselines.COLUMNS) and samples.shape == (2, 6, 1, 32, 32)
        assert float(row[2]) > 60, "its reconstruction is exact"
        kid[name] = float(row[3].split()[0])
    assert kid["copier"] < kid["noise"] / 3


def test_phantom_slices_are_rendered_again(phantom_dir):
    slices, given = read_test_set(phantom_dir)
    assert torch.equal(render_again(phantom_dir, slices, lambda subject, _: subject), given)
    clean = render_again(phantom_dir, slices, end_to_end.without_noise)
    assert 0.001 < (clean - given).square().mean().sqrt() < 0.05, "only the noise is removed"


def test_reconstructions_are_compared_with_slices_and_their_truth(phantom_dir, bench):
    count, rows, figure = end_to_end.compare(phantom_dir, bench.work / "vae", 4)
    psnr = {row[:2]: float(row[2]) for row in rows}
    assert count == 4
    assert psnr["noise-free slice", "slice"] > 25 > psnr["reconstruction", "slice"], "it is untrained"
    assert all(images.min() >= 0 and images.max() <= 1 for images in figure.values())


def test_shortened_preset_keeps_its_proportions():
    preset = measure.Preset.load("adni")
    settings = end_to_end.shortened(preset.vae, preset.vae["max_steps"] // 10, preset.vae["batch_size"] // 2)
    for name in ("warmup_steps", "discriminator_start"):
        assert settings[name] == preset.vae[name] // 10
    assert settings["ema_halflife_images"] == preset.vae["ema_halflife_images"] // 20


@pytest.mark.slow
def test_scaling_prints_its_rows(phantom_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "make_cohort", lambda *_args, **_options: phantom_dir)
    options = Namespace(subjects=12, factors=[1], sizes=[32], steps=4)
    lines = scaling.Bench(tmp_path, options).images(scaling.small_preset(32))
    assert len(lines) == 3 and lines[2].count("|") == lines[0].count("|")


def test_page_is_printed_and_written(tmp_path, capsys):
    measure.report("name", "Title", measure.table(("a", "b"), [(1, 2)]), tmp_path)
    page = measure.results_path("name", tmp_path).read_text()
    assert page in capsys.readouterr().out
    assert "| 1 | 2 |" in page and "torch" in page


def test_memory_and_operations_of_fine_tuning_stable_diffusion_are_counted():
    forward, both = memory.operations(memory.build((), 0, False), 32)
    assert both == pytest.approx(3 * forward, rel=0.01) and forward == pytest.approx(0.176e12, rel=0.01)
    whole, keys_and_values = memory.build((), 0, False), memory.build(memory.KEYS_AND_VALUES, 0, True)
    counted, less = memory.count(whole, 4, True), memory.count(keys_and_values, 4, True)
    assert counted["trained"] == 859_520_964, "as the U-Net of Stable Diffusion 1.5"
    assert counted["weights"] == counted["gradients"] == counted["EMA"] == 4 * counted["trained"]
    assert less["weights"] < 0.52 * counted["weights"] and less["trained"] < 0.03 * counted["trained"]
    small, large, again = (
        memory.activations(memory.build((), 0, False), *size)
        for size in ((1, 16, False), (2, 16, False), (2, 16, True))
    )
    assert 1.9 < large / small <= 2 and again < 0.4 * large
