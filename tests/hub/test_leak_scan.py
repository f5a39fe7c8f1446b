"""The leak scan: findings in every type of file are named, and the push is refused. Cards."""

import dataclasses
import getpass
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from adni_ldm.config import TrainLDMConfig
from adni_ldm.data.slices import open_folder
from adni_ldm.errors import UserError
from adni_ldm.hub.card import NOT_METHOD, write_model_card
from adni_ldm.hub.leak_scan import find_leaks, index_training_data
from adni_ldm.hub.push import push_model
from adni_ldm.hub.report import Report
from adni_ldm.loading import load_pipeline

SUBJECT = "s0p0003"


@pytest.fixture(scope="module")
def data(phantom_dir):
    return index_training_data([open_folder(phantom_dir)], 32)


def write(path, text):
    """Write the text into a file of the type that its name implies, where it may be overlooked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"weight": torch.zeros(2)}, path, metadata={"note": text})
    elif path.suffix == ".png":
        notes = PngImagePlugin.PngInfo()
        notes.add_text("Comment", text, zip=True)
        Image.new("L", (32, 32)).save(path, pnginfo=notes)
    elif path.suffix == ".jpg":
        exif = Image.Exif()
        exif[0x010E] = text  # ImageDescription
        Image.new("L", (32, 32)).save(path, exif=exif)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"note": text}))
    else:
        path.write_text(f"some words, {text}, and more\n")


@pytest.mark.parametrize(
    "name", ["a.json", "README.md", "x/a.csv", "a.py", "w.safetensors", "p.png", "p.jpg"]
)
@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (SUBJECT, f"subject or scan '{SUBJECT}'"),
        (f"{SUBJECT}_01.png", f"subject or scan '{SUBJECT}'"),
        ("002_S_0413", "subject or scan '002_S_0413'"),
        ("I218391", "subject or scan 'I218391'"),
        (str(Path.home() / "runs"), "path"),
        ("/mnt/disk7/study/scan.nii", "path '/mnt/disk7/study/scan.nii'"),
        ("C:\\Users\\Jane\\data", "path"),
        ("file:///study", "path"),
        ("hf_" + "abcdefghijklmnopqrstuvwx", "a secret, hf_a…"),
    ],
)
def test_leaks_are_found_in_every_type_of_file(tmp_path, data, name, text, finding):
    write(tmp_path / name, text)
    findings = find_leaks(tmp_path, data, "me/brains")
    assert any(line.startswith(f"{name}: {finding}") for line in findings), findings


def test_user_names_and_secrets_are_found(tmp_path, data, monkeypatch):
    monkeypatch.setenv("LOGNAME", "janedoe")
    assert getpass.getuser() == "janedoe"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    write(tmp_path / "a.json", "run by janedoe")
    write(tmp_path / "b.md", "0123456789abcdef")
    write(tmp_path / "c.md", "from_pretrained('janedoe/brains')")
    assert find_leaks(tmp_path, data, "janedoe/brains") == [
        "a.json: name of the user 'janedoe'",
        "b.md: a secret, 0123…",
    ]


def test_file_names_are_scanned_and_other_types_are_findings(tmp_path, data):
    write(tmp_path / f"{SUBJECT}_00.md", "nothing")
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    (tmp_path / "link.md").symlink_to(tmp_path / f"{SUBJECT}_00.md")
    assert find_leaks(tmp_path, data, "me/brains") == [
        "link.md: this type of file cannot be scanned",
        f"{SUBJECT}_00.md: subject or scan '{SUBJECT}'",
        "weights.bin: this type of file cannot be scanned",
    ]


def test_numbers_are_ids_only_where_they_occur_as_such(tmp_path, ad_nc_folder):
    """Steps, sizes and losses with the same digits are no findings."""
    data = index_training_data(
        [open_folder(ad_nc_folder({"train/AD": ["1000"], "train/NC": ["218391"]}))], 32
    )
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "metrics.csv").write_text("step,loss,seed\n1000,0.218391,12183910\n")
    (sent / "config.json").write_text('{"num_train_timesteps": 1000, "std": 1.218391}')
    (sent / "README.md").write_text("https://arxiv.org/abs/2112.10752, AD/NC, `runs/ldm`, 1 / 2 </b>\n")
    assert find_leaks(sent, data, "me/brains") == []
    (sent / "a.csv").write_text("file_name\nAD/1000_78.png\n")
    (sent / "b.csv").write_text("scan,loss\n218391,0.1\n")
    assert [line.split(":")[0] for line in find_leaks(sent, data, "me/brains")] == ["a.csv", "b.csv"]


def test_a_training_image_is_found_in_another_format(tmp_path, ad_nc_folder):
    folder = ad_nc_folder({"train/AD": ["1001", "1002"], "train/NC": ["2001", "2002"]})
    data = index_training_data([open_folder(folder)], 256)
    image = Image.open(folder / "train/AD/1001_78.jpeg")
    sent = tmp_path / "sent"
    sent.mkdir()
    image.save(sent / "copy.png")
    image.save(sent / "again.jpg", quality=60)
    Image.fromarray((np.asarray(image) * 0.8).astype(np.uint8)).save(sent / "darker.png")
    other = ad_nc_folder({"train/AD": ["7777"]}, name="other")
    shutil.copyfile(other / "train/AD/7777_78.jpeg", sent / "other.jpg")

    again, copy, darker = find_leaks(sent, data, "me/brains")
    place = "train/AD/1001_78.jpeg"
    assert copy == f"copy.png: identical to the training image {place}"
    assert again.startswith(f"again.jpg: near-duplicate of the training image {place}")
    assert darker.startswith(f"darker.png: near-duplicate of the training image {place}")
    assert find_leaks(sent, data, "me/brains", allow_real_images=True) == []


# ---- The whole push, without a Hub ---------------------------------------------------------------------


@pytest.fixture
def own_run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_findings_are_named_and_the_push_is_refused(own_run, tmp_path):
    write(own_run / "loss.png", str(Path.home() / "runs/loss.png"))
    (own_run / "metrics.csv").write_text("step,loss,val_loss\n1,0.5,0.5\n")
    with pytest.raises(UserError, match=r"nothing was pushed, the leak scan found: loss.png: path"):
        push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    assert (tmp_path / "out/loss.png").is_file(), "kept for inspection"
    with pytest.raises(UserError, match="out is not empty"):
        push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))


def change_report(run, change):
    metrics = json.loads((run / "report/metrics.json").read_text())
    change(metrics)
    (run / "report/metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["verdicts"]["privacy"].update(good=False, text="3 slices are copies"),
            "3 slices are copies",
        ),
        (lambda m: m["verdicts"]["privacy"].update(good=None), "no verdict on privacy"),
        (lambda m: m.pop("verdicts"), "no verdict on privacy"),
        (lambda m: m.update(model_hash="0123"), "evaluates another model"),
        (
            lambda m: m.update(data_hash="0123"),
            "was not trained on .hash 0123.: run evaluate.py with the train",
        ),
    ],
)
def test_an_unfavourable_or_missing_privacy_verdict_is_refused(own_run, tmp_path, change, message):
    change_report(own_run, change)
    with pytest.raises(UserError, match=f"{message}.*--accept_privacy_risk"):
        push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_a_report_the_risk_must_be_accepted_and_the_card_states_it(own_run, tmp_path):
    shutil.rmtree(own_run / "report")
    with pytest.raises(UserError, match="there is no report: run evaluate.py"):
        push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    push_model(own_run, "me/brains", accept_privacy_risk=True, dry_run=str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert "memorized? | **Inconclusive** |" in card and "The verdict on privacy is: **inconclusive**" in card
    assert not (tmp_path / "out/metrics.json").exists()


def test_the_data_must_be_the_training_data(own_run, ad_nc_folder, tmp_path):
    (own_run / "training_config.json").write_text("{}")
    for data_dir in ([], [str(ad_nc_folder())]):
        with pytest.raises(UserError, match="trained on data with the hash"):
            push_model(own_run, "me/brains", data_dir, dry_run=str(tmp_path / "out"))


def test_real_scans_are_pushed_only_with_the_flag(own_run, phantom_dir, tmp_path):
    (own_run / "report/figures").mkdir()
    shutil.copyfile(next((phantom_dir / "train/AD").glob("*.png")), own_run / "report/figures/nearest.png")
    (own_run / "report/report.html").write_text("<html>the report</html>")
    push_model(own_run, "me/brains", dry_run=str(tmp_path / "without"))
    assert not list((tmp_path / "without").glob("*/nearest.png"))
    push_model(own_run, "me/brains", allow_real_images=True, dry_run=str(tmp_path / "with"))
    assert (tmp_path / "with/figures/nearest.png").is_file() and (tmp_path / "with/report.html").is_file()


def test_the_model_card(trained, phantom_dir, tmp_path):
    push_model(trained, "me/brains", dry_run=str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    manifest = json.loads((phantom_dir / "manifest.json").read_text())
    for words in (
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "license: apache-2.0",  # of the phantom cohort
        manifest["hash"],
        "| slice | 1 × 32 × 32, greyscale |",
        "| latent | 4 × 16 × 16 |",
        "| lowest val_loss | 0.85 |",
        "| learning_rate | 0.001 |",
        "distribution of real slices? | **Yes** | fidelity is well |",
        "| fidelity/fid | 12.3 (10.1 to 14.9) | 9.8 | lower is better |",
        'DiffusionPipeline.from_pretrained("me/brains", trust_remote_code=True)',
        "For research only, not for diagnosis",
    ):
        assert words in card
    rows = [line for line in card.splitlines() if line.startswith("| train |")]
    parts = sorted(manifest["splits"]["train"].items())
    assert rows == [f"| train | {c} | {len(p['subjects'])} | {p['images']} |" for c, p in parts]
    assert str(trained) not in card and "/home/somebody" not in card


def test_the_card_of_real_data_states_the_terms(own_run, ad_nc_folder, tmp_path):
    """The data use agreement, and an acknowledgement to be completed."""
    pipeline = load_pipeline(str(own_run))
    listings = [open_folder(ad_nc_folder())]
    write_model_card(
        tmp_path / "R.md", "me/brains", pipeline, own_run, listings, Report(missing="none"), None, []
    )
    card = (tmp_path / "R.md").read_text()
    assert "license_name: adni-data-use-agreement" in card
    assert "To be completed by the author" in card and "adni.loni.usc.edu" in card


def test_settings_left_out_of_the_card_exist():
    """A setting that is renamed must be renamed there as well, or its path is published."""
    assert NOT_METHOD <= {field.name for field in dataclasses.fields(TrainLDMConfig)}
