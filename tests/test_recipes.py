"""The recipes by their real command lines, for a few steps on a small cohort."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from datasets import load_dataset
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adni_ldm.loading import load_pipeline

ROOT = Path(__file__).parents[1]
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml")
VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def run(*words, launcher=(), status=0):
    """Run a recipe as a user would; returns what it printed."""
    words = [str(word) for word in words]
    result = subprocess.run([sys.executable, *launcher, *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def presets(phantom_dir, tmp_path_factory):
    """Settings small enough for seconds, as the YAML files that --config takes."""
    folder = tmp_path_factory.mktemp("presets")
    common = {"data_dir": str(phantom_dir), "image_size": 32, "max_steps": 6, "batch_size": 4, "log_steps": 2}
    common |= {"warmup_steps": 1, "learning_rate": 1e-3, "mixed_precision": "no"}
    vae = common | {"widths": [16, 32], "checkpointing_steps": 0}
    ldm = common | {"unet_widths": [32, 64], "token_dim": 16, "layers_per_block": 1, "validation_steps": 3}
    ldm |= {"num_inference_steps": 2, "checkpointing_steps": 0}
    for name, settings in {"vae": vae, "ldm": ldm}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def vae_dir(presets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    run("train_vae.py", "--config", presets / "vae.yaml", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def ldm_dir(presets, vae_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ldm")
    run("train_ldm.py", "--config", presets / "ldm.yaml", "--vae", vae_dir, "--output_dir", folder)
    return folder


def test_train_vae_leaves_a_vae_and_its_record(vae_dir):
    config = json.loads((vae_dir / "config.json").read_text())
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 4
    assert all(std > 0 for std in config["latents_std"])
    assert json.loads((vae_dir / "training_config.json").read_text())["widths"] == [16, 32]
    table = pd.read_csv(vae_dir / "metrics.csv")
    assert table.loss.dropna().size == 3, "six steps, a line every two"
    assert table.val_psnr.dropna().iloc[-1] > 0
    assert all(Image.open(vae_dir / name).size[0] > 100 for name in ("loss.png", "reconstructions.png"))


def test_train_ldm_leaves_a_whole_pipeline(ldm_dir):
    for part in ("vae", "unet", "class_embedding", "scheduler"):
        assert any((ldm_dir / part).glob("*.json"))
    assert (
        json.loads((ldm_dir / "scheduler/scheduler_config.json").read_text())["_class_name"]
        == "DDIMScheduler"
    )
    own = load_pipeline(str(ldm_dir)).sampling_settings()
    assert own == {"num_inference_steps": 2, "guidance_scale": 1, "eta": 1}, "as given; the class's own"
    table = pd.read_csv(ldm_dir / "metrics.csv")
    assert table.loss.dropna().size == 3 and table.val_loss.dropna().size == 2
    assert all((ldm_dir / name).is_file() for name in ("samples.png", "loss.png", "training_config.json"))
    (file,) = (ldm_dir / "logs").glob("events.*")  # tensorboard's; every tracker gets the same
    tags = EventAccumulator(str(file)).Reload().Tags()
    assert tags["scalars"] and not any(tags[kind] for kind in ("images", "histograms", "tensors"))


def test_the_best_pipeline_is_kept_while_training(presets, vae_dir, tmp_path):
    """On two processes, of which one evaluates; the weights are the same as without evaluation."""
    words = ("train_ldm.py", "--config", presets / "ldm.yaml", "--vae", vae_dir, "--batch_size", 2)
    judged = ("--evaluation_steps", 3, "--evaluate_images", 4, "--classifier_steps", 3)
    run(*words, *judged, "--output_dir", tmp_path / "judged", launcher=TWO_PROCESSES)
    run(*words, "--output_dir", tmp_path / "not", launcher=TWO_PROCESSES)
    table = pd.read_csv(tmp_path / "judged/metrics.csv")
    assert table.kid.dropna().size == table.class_accuracy.dropna().size == 2
    best = json.loads((tmp_path / "judged/best/best.json").read_text())
    assert best["kid"] == pytest.approx(table.kid.min())
    assert best["step"] == table.step[table.kid.idxmin()]
    assert load_pipeline(str(tmp_path / "judged/best")).unet.config.sample_size == 16
    weights = [load_file(tmp_path / name / UNET_WEIGHTS) for name in ("judged", "not")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_sample_writes_a_folder_that_load_dataset_reads(ldm_dir, tmp_path):
    folder = tmp_path / "samples"
    options = ("--model", ldm_dir, "--num_images", 3, "--num_inference_steps", 2, "--mixed_precision", "no")
    run("sample.py", "--class", "all", *options, "--output_dir", folder, "--trajectory")
    images = load_dataset("imagefolder", data_dir=str(folder), split="train", drop_labels=True)
    table = pd.read_csv(folder / "metadata.csv")
    assert sorted(table.file_name) == [
        f"{name}/{index:06d}.png" for name in ("AD", "NC") for index in range(3)
    ]
    assert table.seed.nunique() == 3 and table.model_hash.nunique() == 1
    assert {"label", "num_inference_steps", "guidance_scale", "scheduler"} <= set(images.features)
    assert Image.open(folder / "AD/000000.png").size == (32, 32)
    assert all((folder / name).is_file() for name in ("grid.png", "trajectory.png"))

    # One class by its number, another batch size: the same images up to rounding.
    run("sample.py", "--class", 1, *options, "--batch_size", 2, "--output_dir", tmp_path / "nc")
    made = sorted(path.name for path in (tmp_path / "nc").iterdir())
    assert made == [".settings.json", "NC", "grid.png", "metadata.csv"]
    for index in range(3):
        first, second = (
            torch.tensor(list(Image.open(place / f"NC/{index:06d}.png").tobytes()))
            for place in (folder, tmp_path / "nc")
        )
        assert (first - second).abs().max() <= 1

    assert "not empty" in run("sample.py", *options, "--output_dir", ldm_dir, status=1)


def share_alike(one: Path, other: Path, start: Path, weights: str) -> float:
    """Share of the weights that moved the same way from `start`, to a tenth of the way they went."""
    one, other, start = (load_file(folder / weights) for folder in (one, other, start))
    alike = moved = 0
    for name in start:
        steps = (one[name] - start[name], other[name] - start[name])
        alike += ((steps[0] - steps[1]).abs() <= 0.1 * steps[0].abs()).sum().item()
        moved += steps[0].numel()
    return alike / moved


def test_two_processes_take_the_step_of_one_vae(presets, tmp_path):
    """Gradients are averaged: 2 processes × batch 4 move the weights as 1 process × batch 8 does.

    After one update of Adam a weight's step is ± the learning rate by the sign of its gradient, so a missing
    average shows in many signs, and rounding in a handful.
    """
    command = ("train_vae.py", "--config", presets / "vae.yaml", "--report_to", "none", "--output_dir")
    still = ("--learning_rate", 1e-12, "--max_steps", 1)
    run(*command, tmp_path / "start", *still)
    run(*command, tmp_path / "one", "--max_steps", 1, "--batch_size", 8)
    run(*command, tmp_path / "two", "--max_steps", 1, "--batch_size", 4, launcher=TWO_PROCESSES)
    assert share_alike(tmp_path / "one", tmp_path / "two", tmp_path / "start", VAE_WEIGHTS) > 0.97
    statistics = [
        json.loads((tmp_path / name / "config.json").read_text())["latents_std"] for name in ("one", "two")
    ]
    assert statistics[0] == pytest.approx(statistics[1], rel=1e-2)


def test_two_processes_take_the_step_of_one_ldm(presets, vae_dir, tmp_path):
    command = ("train_ldm.py", "--config", presets / "ldm.yaml", "--vae", vae_dir, "--report_to", "none")
    command += ("--conditions", "age", "sex", "slice_mm")
    command += ("--no_use_ema", "--max_steps", 1, "--output_dir")
    run(*command, tmp_path / "start", "--learning_rate", 1e-12)
    run(*command, tmp_path / "one", "--batch_size", 8)
    run(*command, tmp_path / "two", "--batch_size", 4, launcher=TWO_PROCESSES)
    folders = [tmp_path / name for name in ("one", "two", "start")]
    assert share_alike(*folders, UNET_WEIGHTS) > 0.97
    assert share_alike(*folders, UNET_WEIGHTS.replace("unet", "condition_embedding")) > 0.97


def test_a_resumed_run_repeats_the_uninterrupted_one(presets, vae_dir, tmp_path):
    """Mid-epoch, with accumulation, EMA, augmented variants and newly sampled latents: bit for bit.

    From the cache that the first run left, and from one that is made anew.
    """
    command = ("train_ldm.py", "--config", presets / "ldm.yaml", "--vae", vae_dir, "--report_to", "none")
    command += (
        "--gradient_accumulation_steps",
        2,
        "--checkpointing_steps",
        2,
        "--checkpoints_total_limit",
        1,
    )
    command += ("--latent_variants", 1, "--latent_cache", tmp_path / "latents")
    run(*command, "--output_dir", tmp_path / "whole")
    kept = [path.name for path in (tmp_path / "whole/checkpoints").iterdir()]
    assert kept == ["step-00000006"], "one is kept"
    run(*command, "--checkpoints_total_limit", 9, "--output_dir", tmp_path / "all")
    checkpoint = tmp_path / "all/checkpoints/step-00000004"
    run(*command, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    whole, resumed = (load_file(tmp_path / name / UNET_WEIGHTS) for name in ("whole", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    # `latest` of a folder without any is a first start.
    shutil.rmtree(tmp_path / "latents")
    run(*command, "--output_dir", tmp_path / "first", "--resume_from_checkpoint", "latest")
    first = load_file(tmp_path / "first" / UNET_WEIGHTS)
    assert all(torch.equal(whole[name], first[name]) for name in whole)


def test_a_resumed_vae_repeats_the_uninterrupted_one_with_its_discriminator(presets, tmp_path):
    """With both networks' moments, the weight between them, accumulation and EMA: bit for bit.

    Before its start the discriminator changes nothing, nor is it changed.
    """
    command = ("train_vae.py", "--config", presets / "vae.yaml", "--report_to", "none", "--use_ema")
    command += (
        "--gradient_accumulation_steps",
        2,
        "--checkpointing_steps",
        1,
        "--checkpoints_total_limit",
        9,
    )
    command += ("--spectral_weight", 1)
    against = ("--discriminator_weight", 0.5, "--discriminator_start", 2, "--discriminator_width", 8)
    run(*command, "--output_dir", tmp_path / "alone", "--max_steps", 6)
    run(*command, *against, "--output_dir", tmp_path / "whole")
    steps = tmp_path / "whole/checkpoints"
    run(
        *command,
        *against,
        "--output_dir",
        tmp_path / "on",
        "--resume_from_checkpoint",
        steps / "step-00000004",
    )
    whole, resumed, alone = (load_file(tmp_path / name / VAE_WEIGHTS) for name in ("whole", "on", "alone"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], alone[name]) for name in whole)

    def weights(run_name, step, file="model.safetensors"):
        return load_file(tmp_path / run_name / f"checkpoints/step-{step:08d}" / file)

    for step, alike in ((2, True), (3, True), (4, False)):  # in its first update it is only measured
        one, other = weights("alone", step), weights("whole", step)
        assert all(torch.equal(one[name], other[name]) for name in one) == alike
    first, second, third = (weights("whole", step, "model_1.safetensors") for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(second["network.final_conv.conv.weight"], third["network.final_conv.conv.weight"])
    assert third["d_weight"] > 0
    table = pd.read_csv(tmp_path / "whole/metrics.csv")
    assert table.discriminator_loss.dropna().tolist()[0] == 0 < table.discriminator_loss.dropna().iloc[-1]


def test_fine_tuning_goes_on_from_the_weights_given(presets, vae_dir, ldm_dir, tmp_path):
    still = ("--max_steps", 1, "--learning_rate", 1e-12, "--report_to", "none")
    run(
        "train_vae.py",
        "--config",
        presets / "vae.yaml",
        "--init_from",
        vae_dir,
        "--output_dir",
        tmp_path / "vae",
        *still,
    )
    run(
        "train_ldm.py",
        "--config",
        presets / "ldm.yaml",
        "--init_from",
        ldm_dir,
        "--output_dir",
        tmp_path / "ldm",
        *still,
    )
    for start, tuned in (
        (vae_dir / VAE_WEIGHTS, tmp_path / "vae" / VAE_WEIGHTS),
        (ldm_dir / UNET_WEIGHTS, tmp_path / "ldm" / UNET_WEIGHTS),
    ):
        before, after = load_file(start), load_file(tuned)
        assert all(torch.allclose(before[name], after[name], atol=1e-8) for name in before)


def test_fp16_without_a_gpu_is_refused_in_one_line(phantom_dir, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("this machine has a GPU, where fp16 is what it should be")
    command = ("train_vae.py", "--data_dir", phantom_dir, "--output_dir", tmp_path / "vae")
    printed = run(*command, "--mixed_precision", "fp16", status=1)
    assert printed.strip().splitlines()[-1].startswith("train_vae.py: error: fp16 needs a GPU")
    assert "--mixed_precision bf16" in printed and "Traceback" not in printed
    launcher = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_config.yaml",
        "--num_processes",
        "1",
    )
    assert "fp16 needs a GPU" in run(*command, launcher=launcher, status=1)
    assert not (tmp_path / "vae").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train_vae.py", "--data_dir", "nowhere"), "nowhere: no such folder"),
        (
            ("train_ldm.py", "--data_dir", "{data}", "--image_size", 32, "--vae", "runs/none"),
            "runs/none: no such folder",
        ),
        (("train_vae.py", "--config", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("train_vae.py", "--max_steps", 0), "--max_steps 0 must be at least 1"),
        (
            ("train_vae.py", "--discriminator_weight", 1, "--image_size", 16),
            "a discriminator needs slices of 32 pixels",
        ),
        (("train_ldm.py", "--prediction_type", "epsilon"), "rescale_betas_zero_snr"),
        (("sample.py", "--model", "{model}", "--class", "MCI"), "classes are AD (0), NC (1)"),
        (("sample.py", "--model", "./nowhere"), "./nowhere: no such folder"),
        (("prepare_data.py", "wash"), "no command 'wash'"),
        (("prepare_data.py", "check", "--classes", "AD"), "--classes AD: give two or more"),
    ],
)
def test_errors_are_reported_in_one_line(words, message, phantom_dir, ldm_dir, tmp_path):
    words = [str(word).format(data=phantom_dir, model=ldm_dir) for word in words]
    output = [] if words[0] == "prepare_data.py" else ["--output_dir", tmp_path / "out"]
    printed = run(*words, *output, status=1)
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"{words[0]}: error: ") and message in last
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_check_reports_the_folder_and_fails_on_what_cannot_be_trained_on(phantom_dir, tmp_path):
    before = sorted(phantom_dir.rglob("*"))
    printed = run("prepare_data.py", "check", phantom_dir, "--figures", tmp_path / "figures")
    assert "train  AD" in printed and str(tmp_path / "figures/contact_sheet.png") in printed
    assert all(Image.open(tmp_path / f"figures/{name}.png") for name in ("contact_sheet", "histograms"))
    assert sorted(phantom_dir.rglob("*")) == before, "nothing is written to the data"
    (tmp_path / "train/AD").mkdir(parents=True)
    printed = run("prepare_data.py", "check", tmp_path, status=1)
    assert "no images of class AD" in printed and "Traceback" not in printed
