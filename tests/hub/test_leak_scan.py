"""What must not leave: found in every kind of file, named, and the push refused."""

import getpass
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from adni_ldm.data.slices import open_folder
from adni_ldm.errors import UserError
from adni_ldm.hub.card import Report, write_model_card
from adni_ldm.hub.leak_scan import hash_data, look_through
from adni_ldm.hub.share import share_model
from adni_ldm.loading import load_pipeline

SUBJECT = "s0p0003"


@pytest.fixture(scope="module")
def data(phantom_dir):
    return hash_data([open_folder(phantom_dir)], 32)


def write(path, text):
    """The text in a file of the kind that the name says, where somebody might leave it."""
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
    ("text", "said"),
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
def test_what_must_not_leave_is_found_in_every_kind_of_file(tmp_path, data, name, text, said):
    write(tmp_path / name, text)
    findings = look_through(tmp_path, data, "me/brains")
    assert any(line.startswith(f"{name}: {said}") for line in findings), findings


def test_the_user_and_tokens_of_any_form_are_found(tmp_path, data, monkeypatch):
    monkeypatch.setenv("LOGNAME", "janedoe")
    assert getpass.getuser() == "janedoe"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    write(tmp_path / "a.json", "run by janedoe")
    write(tmp_path / "b.md", "0123456789abcdef")
    write(tmp_path / "c.md", "from_pretrained('janedoe/brains')")
    assert look_through(tmp_path, data, "janedoe/brains") == [
        "a.json: name of the user 'janedoe'",
        "b.md: a secret, 0123…",
    ]


def test_names_of_files_count_and_what_cannot_be_looked_into_is_named(tmp_path, data):
    write(tmp_path / f"{SUBJECT}_00.md", "nothing")
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    (tmp_path / "link.md").symlink_to(tmp_path / f"{SUBJECT}_00.md")
    assert look_through(tmp_path, data, "me/brains") == [
        "link.md: not a kind of file that can be looked into",
        f"{SUBJECT}_00.md: subject or scan '{SUBJECT}'",
        "weights.bin: not a kind of file that can be looked into",
    ]


def test_numbers_are_subjects_only_where_they_stand_as_such(tmp_path, ad_nc_folder):
    """Steps, sizes and losses of the same digits are none."""
    data = hash_data([open_folder(ad_nc_folder({"train/AD": ["1000"], "train/NC": ["218391"]}))], 32)
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "metrics.csv").write_text("step,loss,seed\n1000,0.218391,12183910\n")
    (sent / "config.json").write_text('{"num_train_timesteps": 1000, "std": 1.218391}')
    (sent / "README.md").write_text("https://arxiv.org/abs/2112.10752, AD/NC, `runs/ldm`, 1 / 2 </b>\n")
    assert look_through(sent, data, "me/brains") == []
    (sent / "a.csv").write_text("file_name\nAD/1000_78.png\n")
    (sent / "b.csv").write_text("scan,loss\n218391,0.1\n")
    assert [line.split(":")[0] for line in look_through(sent, data, "me/brains")] == ["a.csv", "b.csv"]


def test_a_training_image_is_found_however_it_was_saved(tmp_path, ad_nc_folder):
    folder = ad_nc_folder({"train/AD": ["1001", "1002"], "train/NC": ["2001", "2002"]})
    data = hash_data([open_folder(folder)], 256)
    picture = Image.open(folder / "train/AD/1001_78.jpeg")
    sent = tmp_path / "sent"
    sent.mkdir()
    picture.save(sent / "copy.png")
    picture.save(sent / "again.jpg", quality=60)
    Image.fromarray((np.asarray(picture) * 0.8).astype(np.uint8)).save(sent / "darker.png")
    other = ad_nc_folder({"train/AD": ["7777"]}, name="other")
    shutil.copyfile(other / "train/AD/7777_78.jpeg", sent / "other.jpg")

    again, copy, darker = look_through(sent, data, "me/brains")
    place = "train/AD/1001_78.jpeg"
    assert copy == f"copy.png: is the picture {place} of the data"
    assert again.startswith(f"again.jpg: is nearly the picture {place} of the data")
    assert darker.startswith(f"darker.png: is nearly the picture {place} of the data")
    assert look_through(sent, data, "me/brains", allow_real_images=True) == []


# ---- The whole way, without a Hub -------------------------------------------------------------------------


@pytest.fixture
def own_run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_what_was_found_is_named_and_the_push_refused(own_run, tmp_path):
    write(own_run / "loss.png", str(Path.home() / "runs/loss.png"))
    (own_run / "metrics.csv").write_text("step,loss,val_loss\n1,0.5,0.5\n")
    with pytest.raises(UserError, match=r"nothing was pushed.*: loss.png: path"):
        share_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    assert (tmp_path / "out/loss.png").is_file(), "to be looked at"
    with pytest.raises(UserError, match="out is not empty"):
        share_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))


def change_report(run, change):
    metrics = json.loads((run / "report/metrics.json").read_text())
    change(metrics)
    (run / "report/metrics.json").write_text(json.dumps(metrics))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: m["verdicts"]["privacy"].update(good=False, text="3 slices are copies"),
            "3 slices are copies",
        ),
        (lambda m: m["verdicts"]["privacy"].update(good=None), "no verdict on privacy"),
        (lambda m: m.pop("verdicts"), "no verdict on privacy"),
        (lambda m: m.update(model_hash="0123"), "judged another model"),
    ],
)
def test_a_privacy_verdict_that_is_bad_or_missing_is_refused(own_run, tmp_path, change, said):
    change_report(own_run, change)
    with pytest.raises(UserError, match=f"{said}.*--accept_privacy_risk"):
        share_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_without_a_report_the_risk_must_be_accepted_and_the_card_says_so(own_run, tmp_path):
    shutil.rmtree(own_run / "report")
    with pytest.raises(UserError, match="there is no report: run evaluate.py"):
        share_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    share_model(own_run, "me/brains", accept_privacy_risk=True, dry_run=str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert "| privacy | **not known** |" in card and "**which is not known**" in card
    assert not (tmp_path / "out/metrics.json").exists()


def test_the_data_must_be_those_it_was_trained_on(own_run, ad_nc_folder, tmp_path):
    (own_run / "training_config.json").write_text("{}")
    for data_dir in ([], [str(ad_nc_folder())]):
        with pytest.raises(UserError, match="trained on data with the hash"):
            share_model(own_run, "me/brains", data_dir, dry_run=str(tmp_path / "out"))


def test_pictures_of_real_scans_leave_only_when_told(own_run, phantom_dir, tmp_path):
    (own_run / "report/figures").mkdir()
    shutil.copyfile(next((phantom_dir / "train/AD").glob("*.png")), own_run / "report/figures/nearest.png")
    (own_run / "report/report.html").write_text("<html>the report</html>")
    share_model(own_run, "me/brains", dry_run=str(tmp_path / "without"))
    assert not list((tmp_path / "without").glob("*/nearest.png"))
    share_model(own_run, "me/brains", allow_real_images=True, dry_run=str(tmp_path / "with"))
    assert (tmp_path / "with/figures/nearest.png").is_file() and (tmp_path / "with/report.html").is_file()


def test_the_card_says_what_is_known(trained, phantom_dir, tmp_path):
    share_model(trained, "me/brains", dry_run=str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    manifest = json.loads((phantom_dir / "manifest.json").read_text())
    for words in (
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "license: apache-2.0",  # of the phantom cohort
        manifest["hash"],
        "| slice | 1 × 32 × 32, grey |",
        "| latent | 4 × 16 × 16 |",
        "| smallest val_loss | 0.85 |",
        "| learning_rate | 0.001 |",
        "| fidelity | **good** | fidelity is well |",
        "| fidelity/fid | 12.3 (10.1 to 14.9) | 9.8 | lower is better |",
        'DiffusionPipeline.from_pretrained("me/brains", trust_remote_code=True)',
        "Not for diagnosis",
    ):
        assert words in card
    rows = [line for line in card.splitlines() if line.startswith("| train |")]
    parts = sorted(manifest["splits"]["train"].items())
    assert rows == [f"| train | {c} | {len(p['subjects'])} | {p['images']} |" for c, p in parts]
    assert str(trained) not in card and "/home/somebody" not in card


def test_the_card_of_real_data_asks_for_the_terms(own_run, tmp_path):
    """Its agreement, and its acknowledgement to be completed."""
    pipeline = load_pipeline(str(own_run))
    write_model_card(
        tmp_path / "R.md", "me/brains", pipeline, own_run, [], False, Report({}, "none"), None, []
    )
    card = (tmp_path / "R.md").read_text()
    assert "license_name: adni-data-use-agreement" in card
    assert "To be completed by the author" in card and "adni.loni.usc.edu" in card
