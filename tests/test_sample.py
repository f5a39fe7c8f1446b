"""sample.py: distributed over processes, interrupted and continued; refuses the folder of another run."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import sample
from adni_ldm.errors import UserError
from adni_ldm.generation import image_seed
from adni_ldm.models import ClassEmbedding, build_autoencoder, build_denoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")
# Seven of each class in threes: two whole batches and a short one, an odd number of batches a class.
SIZES = ("--num_images", 7, "--batch_size", 3, "--num_inference_steps", 2, "--mixed_precision", "no")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    vae = build_autoencoder(16, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    unet = build_denoiser(4, 8, widths=(32, 64), token_dim=16, layers_per_block=1)
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    folder = tmp_path_factory.mktemp("model")
    ClassConditionalLDMPipeline(vae, unet, ClassEmbedding(token_dim=16), scheduler).save_pretrained(folder)
    return folder


def words(model, folder, *more):
    return [str(word) for word in (*SIZES, "--model", model, "--output_dir", folder, *more)]


@pytest.fixture
def generate(model, monkeypatch, capsys):
    """Run the recipe in this process; returns what it printed."""

    def run(folder, *more):
        monkeypatch.setattr(sys, "argv", ["sample.py", *words(model, folder, *more)])
        sample.main()
        return capsys.readouterr().out

    return run


def contents(folder):
    """Bytes of everything that a run leaves, except the figure that matplotlib saves."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "grid.png")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The samples of one process, not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "samples"
    command = [sys.executable, "sample.py", *words(model, folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_files_are_the_pipelines_own_images(model, generate, tmp_path):
    """Rounded to 8 bits as diffusers does, not truncated."""
    generate(tmp_path / "samples", "--class", "NC")
    pipeline = ClassConditionalLDMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    for batch in (range(3), range(3, 6)):
        generators = [torch.Generator().manual_seed(image_seed(0, index)) for index in batch]
        images = pipeline(["NC"] * 3, num_inference_steps=2, generator=generators).images
        for index, image in zip(batch, images):
            encoded = io.BytesIO()
            image.save(encoded, format="png")
            assert (tmp_path / f"samples/NC/{index:06d}.png").read_bytes() == encoded.getvalue()


def test_two_processes_generate_what_one_does(model, whole, tmp_path):
    """Byte for byte, the table as well: which slices a batch holds has nothing to do with the processes."""
    command = [sys.executable, *LAUNCH, "sample.py", *words(model, tmp_path / "two")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "process 1 of 2" in result.stderr
    assert contents(tmp_path / "two") == contents(whole)
    table = pd.read_csv(whole / "metadata.csv")
    assert list(table.file_name) == [f"{name}/{index:06d}.png" for name in ("AD", "NC") for index in range(7)]
    assert table.seed.nunique() == 7 and list(table.seed[:7]) == list(table.seed[7:])
    assert set(table.eta) == {1} and set(table.guidance_scale) == {1}, "random at every step"


def test_settings_not_given_are_the_models_own_and_are_recorded(model, monkeypatch, tmp_path):
    own = {"num_inference_steps": 3, "guidance_scale": 2.0, "eta": 0.25}
    pipeline = ClassConditionalLDMPipeline.from_pretrained(model, **own)
    pipeline.save_pretrained(tmp_path / "own")
    command = ("sample.py", "--model", tmp_path / "own", "--output_dir", tmp_path / "samples")

    def run(*more):
        words = (*command, "--num_images", 1, "--mixed_precision", "no", *more)
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        sample.main()

    run()
    table, settings = pd.read_csv(tmp_path / "samples/metadata.csv"), tmp_path / "samples/.settings.json"
    assert {name: table[name][0] for name in own} == own
    assert own.items() <= json.loads(settings.read_text()).items()
    image = pipeline("AD", generator=torch.Generator().manual_seed(image_seed(0, 0))).images[0]
    assert np.array_equal(Image.open(tmp_path / "samples/AD/000000.png"), image)
    run("--num_inference_steps", 3, "--guidance_scale", 2, "--eta", 0.25)  # the same settings: it continues
    with pytest.raises(UserError, match="guidance_scale was 2.0, is 1.0; eta was 0.25, is 0.0;"):
        run("--guidance_scale", 1, "--eta", 0, "--seed", 1)


def test_a_killed_run_continues_and_equals_an_undisturbed_one(model, whole, generate, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "sample.py", *words(model, folder, "--num_inference_steps", 40)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(folder.glob("AD/*.png")):  # the first batch of five is done
        assert run.poll() is None
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (folder / "metadata.csv").exists(), "killed before its end"
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.png")}
    for path in finished:
        Image.open(path).load()  # none is half written
    (folder / "NC/.000006.png.partial").write_bytes(b"half")

    with pytest.raises(UserError, match="steps was 40, is 2"):
        generate(folder)
    generate(folder, "--num_inference_steps", 40)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items()), "kept"
    generate(tmp_path / "undisturbed", "--num_inference_steps", 40)
    assert contents(folder) == contents(tmp_path / "undisturbed")

    # Slices lost out of the middle of batches are generated again, identically; the others are not touched.
    for lost in ("AD/000001.png", "NC/000006.png", "metadata.csv", "grid.png"):
        (whole / lost).rename(tmp_path / lost.replace("/", "-"))
    kept = {path: path.stat().st_mtime_ns for path in whole.glob("*/*.png")}
    generate(whole)
    assert len(kept) == 12 and all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert (whole / "AD/000001.png").read_bytes() == (tmp_path / "AD-000001.png").read_bytes()
    assert (whole / "NC/000006.png").read_bytes() == (tmp_path / "NC-000006.png").read_bytes()
    assert (whole / "metadata.csv").read_bytes() == (tmp_path / "metadata.csv").read_bytes()
    assert (whole / "grid.png").is_file()


def test_a_slice_that_cannot_be_decoded_is_missing(generate, whole, tmp_path):
    """As another program, or a version before this one, leaves it at a power cut."""
    shutil.copytree(whole, tmp_path / "cut")
    for name, size in (("AD/000002.png", 0), ("NC/000005.png", 60)):
        os.truncate(tmp_path / "cut" / name, size)
    generate(tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(whole)


def test_two_runs_on_one_folder(generate, held_by_another, whole):
    before = contents(whole)
    with held_by_another(whole), pytest.raises(UserError, match="samples is being written by process"):
        generate(whole)
    (whole / ".lock").unlink()
    assert contents(whole) == before


def test_a_folder_of_something_else_is_refused(generate, whole, tmp_path):
    before = contents(whole)
    changes = {
        ("--seed", 1): "seed was 0, is 1",
        ("--guidance_scale", 1.5, "--eta", 0): "guidance_scale was 1.0, is 1.5; eta was 1.0, is 0.0",
        ("--guidance_interval", 0.2, 0.8): "guidance_interval was 0.0 1.0, is 0.2 0.8",
        ("--class", "AD"): r"class was \['AD', 'NC'\], is \['AD'\]",
        ("--num_images", 8, "--batch_size", 4): "num_images was 7, is 8; batch_size was 3, is 4",
    }
    for change, named in changes.items():
        with pytest.raises(UserError, match=named):
            generate(whole, *change)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="not empty"):
        generate(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"] and contents(whole) == before


def test_wrong_numbers_are_refused(generate, tmp_path):
    changes = (("--guidance_interval", 0.8, 0.2), ("--guidance_interval", 0.5), ("--num_images", 0))
    for change in (*changes, ("--num_inference_steps", 0), ("--eta", 1.5)):
        with pytest.raises(UserError, match=f"{change[0]} "):
            generate(tmp_path / "none", *change)
    assert not (tmp_path / "none").exists()
