"""The leak scan: findings in every type of file are named, and the push is refused. Cards."""

import dataclasses
import getpass
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from adni_ldm.config import TrainLDMConfig
from adni_ldm.data.slices import open_folder
from adni_ldm.errors import UserError
from adni_ldm.hub.card import NOT_METHOD, write_model_card
from adni_ldm.hub.leak_scan import check_leaks, find_leaks, index_training_data
from adni_ldm.hub.push import push_model
from adni_ldm.hub.report import Report
from adni_ldm.loading import load_pipeline
from adni_ldm.models import ConditionEmbedding

SUBJECT = "s0p0003"


@pytest.fixture(scope="module")
def data(phantom_dir):
    return index_training_data([open_folder(phantom_dir)], 32)


def write(path, text):
    """Write the text into a file of the type that its name implies, where it may be overlooked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"weight": torch.zeros(2)}, path, metadata={"note": text})
    elif path.suffix == ".json":
        path.write_text(json.dumps({"note": text}))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump({"data": {"notes": [{"of": text}]}}))
    else:
        path.write_text(f"some words, {text}, and more\n")


@pytest.mark.parametrize(
    "name", ["a.json", "README.md", "x/a.csv", "a.py", "w.safetensors", "a.yaml", "a.txt"]
)
@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (SUBJECT, f"subject or scan '{SUBJECT}'"),
        (f"{SUBJECT}_01.png", f"subject or scan '{SUBJECT}'"),
        (SUBJECT.upper(), f"subject or scan '{SUBJECT}'"),
        ("002_S_0413", "subject or scan '002_S_0413'"),
        ("I218391", "subject or scan 'I218391'"),
        (str(Path.home() / "runs"), "path"),
        ("/mnt/disk7/study/scan.nii", "path '/mnt/disk7/study/scan.nii'"),
        ("C:\\Users\\Jane\\data", "path"),
        ("\\\\server\\study\\scans", "path"),
        ("host:/mnt/disk7/study", "path '/mnt/disk7/study'"),
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


def test_the_name_of_the_machine_is_found(tmp_path, data, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node17")
    (tmp_path / "a.md").write_text("run on node17")
    assert find_leaks(tmp_path, data, "me/brains") == ["a.md: name of the machine 'node17'"]


def test_only_the_account_is_hidden_from_the_scan_and_not_in_a_path(tmp_path, data, monkeypatch):
    monkeypatch.setenv("LOGNAME", "janedoe")
    write(tmp_path / "a.md", "[janedoe/brains](https://huggingface.co/janedoe/brains), see janedoe/brains.")
    write(tmp_path / "b.md", "in /home/janedoe/brains/x.png")
    write(tmp_path / "c.md", "in runs/janedoe/brains")
    write(tmp_path / "d.md", "in janedoe/brains/x.png")
    assert find_leaks(tmp_path, data, "janedoe/brains") == [
        "b.md: name of the user 'janedoe'",
        "b.md: path '/home/janedoe/brains/x.png'",
        "c.md: name of the user 'janedoe'",
        "d.md: name of the user 'janedoe'",
    ]
    write(tmp_path / "e.md", f"from_pretrained('me/{SUBJECT}')")
    findings = find_leaks(tmp_path, data, "janedoe/brains", f"me/{SUBJECT}")
    assert f"e.md: subject or scan '{SUBJECT}'" in findings, "the name of the repository names a subject"


def test_a_file_that_is_not_what_its_name_says_is_a_finding(tmp_path, data):
    (tmp_path / "a.md").write_bytes(SUBJECT.encode("utf-16"))
    (tmp_path / "b.py").write_bytes(b"x = 1\0PK")
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.yaml").write_text("a: [")
    findings = find_leaks(tmp_path, data, "me/brains")
    assert [line.split(" (")[0] for line in findings] == [
        f"{name}{suffix}: cannot be read as {suffix}"
        for name, suffix in zip("abcd", (".md", ".py", ".json", ".yaml"))
    ]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image_leaves_as_its_pixels(tmp_path, data, suffix):
    """Without text, EXIF, private chunks, further frames, and what follows the image."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    image, path, exif = Image.fromarray(pixels), tmp_path / f"p{suffix}", Image.Exif()
    exif[0x9286] = b"UNICODE\0" + SUBJECT.encode("utf-16-le")  # UserComment
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", SUBJECT, zip=True)
    notes.add_itxt("Comment", SUBJECT, lang="en", zip=True)
    notes.add(b"suBj", SUBJECT.encode())
    more = {"pnginfo": notes, "save_all": True, "append_images": [image]} if suffix == ".png" else {}
    image.save(path, exif=exif, **more)
    with path.open("ab") as file:
        file.write(b"PK\3\4" + SUBJECT.encode())
    check_leaks(tmp_path, data, "me/brains")
    kept = path.read_bytes()
    image.convert("L").save(tmp_path / f"plain{suffix}", quality=95)
    plain = (tmp_path / f"plain{suffix}").read_bytes()
    assert kept == plain if suffix == ".png" else len(kept) <= len(plain) + 50 and b"UNI" not in kept
    assert SUBJECT.encode() not in kept and b"suBj" not in kept and b"acTL" not in kept


def test_a_file_with_the_name_of_an_image_is_refused(tmp_path, data):
    (tmp_path / "p.png").write_bytes(b"PAR1 of parquet")
    with pytest.raises(UserError, match="p.png: not an image .*remove it"):
        check_leaks(tmp_path, data, "me/brains")


def test_an_image_is_refused_without_training_images_to_compare_it_with(tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "p.png")
    with pytest.raises(UserError, match="p.png: there are no training images to compare it with"):
        check_leaks(tmp_path, index_training_data([], 32), "me/brains")


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
    (sent / "c.csv").write_text("step,Subject\n1,1000\n")
    (sent / "d.yaml").write_text("data:\n  subject: 1000\n")
    assert [line.split(":")[0][0] for line in find_leaks(sent, data, "me/brains")] == list("abcd")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "file_name,of\nAD/000000.png,AB\n"),
        ("a.csv", "AB,0.1\n"),
        ("a.yaml", "cohort:\n  - subject: AB\n"),
        ("a.yaml", 'note: "\\x41B"\n'),
        ("a.json", '{"who": "\\u0041B"}'),
        ("README.md", "| AD | AB |\n"),
        ("a.html", "<td>AB</td>"),
        ("a.html", "<td>A&#66;</td>"),
        ("a.txt", "AB\n"),
    ],
)
def test_a_short_name_is_found_as_a_field(tmp_path, data, name, text):
    data = dataclasses.replace(data, ids=frozenset(["AB"]))
    (tmp_path / "other.md").write_text("ABOUT AB-initio, AD, NC | ABC |\n")
    assert find_leaks(tmp_path, data, "me/brains") == []
    (tmp_path / name).write_text(text)
    assert find_leaks(tmp_path, data, "me/brains") == [f"{name}: subject or scan 'AB'"]


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
    change_report(own_run, lambda m: m["verdicts"]["fidelity"].update(text="see /mnt/disk7/study/scan.nii"))
    with pytest.raises(UserError, match=r"nothing was pushed, the leak scan found: README.md: path '/mnt"):
        push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    assert (tmp_path / "out/README.md").is_file(), "kept for inspection"
    with pytest.raises(UserError, match="out is not empty"):
        push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))


def change_report(run, change):
    metrics = json.loads((run / "report/metrics.json").read_text())
    change(metrics)
    (run / "report/metrics.json").write_text(json.dumps(metrics))


def test_what_was_planted_in_a_run_does_not_leave(own_run, phantom_dir, tmp_path):
    """A slice as loss.png, words in metrics.csv, keys that diffusers keeps unread, a path in the settings."""
    shutil.copyfile(next((phantom_dir / "train/AD").glob("*.png")), own_run / "loss.png")
    (own_run / "metrics.csv").write_text(f"step,loss,of\n1,0.5,{SUBJECT}\n2,0.4,{SUBJECT}\n")
    (own_run / "notes.parquet").write_bytes(b"PAR1")
    for part in ("unet", "vae"):
        config = json.loads((own_run / part / "config.json").read_text())
        config["_trained_on"][0]["subject"] = SUBJECT
        config |= {"_pixels": [1, 2, 3], "pixels": "iVBORw0KGgo"}
        (own_run / part / "config.json").write_text(json.dumps(config))
    for name in ("model_index.json", "scheduler/scheduler_config.json", "class_embedding/config.json"):
        config = json.loads((own_run / name).read_text())
        (own_run / name).write_text(json.dumps(config | {"pixels": "iVBORw0KGgo", "_pixels": [1]}))
    settings = json.loads((own_run / "training_config.json").read_text())
    settings |= {"latent_cache": "/mnt/disk7/latents"}
    (own_run / "training_config.json").write_text(json.dumps(settings))
    push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    assert (tmp_path / "out/metrics.csv").read_text() == "step,loss\n1,0.5\n2,0.4\n"
    assert Image.open(tmp_path / "out/loss.png").width > 300, "the curves"
    texts = [path.read_text() for path in (tmp_path / "out").rglob("*.*") if path.suffix in (".json", ".md")]
    assert not any(word in text for text in texts for word in (SUBJECT, 'pixels"', "disk7", "latent_cache"))
    assert not list((tmp_path / "out").rglob("*.parquet"))


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


def test_other_sections_of_the_report_do_not_leave(own_run, tmp_path):
    change_report(own_run, lambda metrics: metrics.update(settings={"real": "a folder"}))
    push_model(own_run, "me/brains", dry_run=str(tmp_path / "out"))
    left = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(left) == {"fidelity", "privacy", "verdicts", "model_hash", "data_hash"}


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


def test_the_card_names_the_base_model_and_its_license(own_run, phantom_dir, tmp_path):
    pipeline = load_pipeline(str(own_run))
    for part, name in ((pipeline.unet, "maker/base"), (pipeline.vae, "base-of-a-folder")):
        part.register_to_config(_base_model={"name": name, "license": "openrail++"})
    listings, report = [open_folder(phantom_dir)], Report(missing="none")
    write_model_card(tmp_path / "README.md", "me/m", pipeline, own_run, listings, report, None, [])
    card = (tmp_path / "README.md").read_text()
    assert "base_model:\n- maker/base\n" in card and "license: openrail++" in card
    for name in ("maker/base", "base-of-a-folder"):
        assert f"fine-tuned from {name} (license: openrail++)" in card

    # Where it is not known which license counts, the card does not choose one.
    for unet, vae in (("not stated", "mit"), ("mit", "cc-by-nc-4.0"), ("other", "other")):
        pipeline.unet.register_to_config(_base_model={"name": "maker/base", "license": unet})
        pipeline.vae.register_to_config(_base_model={"name": "maker/vae", "license": vae})
        for given, expected in (
            (None, "license: other\nlicense_name: of-the-base-models"),
            ("mit", "license: mit"),
        ):
            arguments = ("me/m", pipeline, own_run, listings, report, given, [])
            write_model_card(tmp_path / "README.md", *arguments)
            assert expected in (tmp_path / "README.md").read_text()


def test_the_card_names_the_conditions_with_their_ranges(own_run, phantom_dir, tmp_path):
    pipeline = load_pipeline(str(own_run))
    listings, report = [open_folder(phantom_dir)], Report(missing="none")
    write_model_card(tmp_path / "plain.md", "me/m", pipeline, own_run, listings, report, None, [])
    assert "onditions beside the class" not in (tmp_path / "plain.md").read_text()
    about = {"age": {"mean": 70.0, "std": 8.0, "low": 55.0, "high": 90.0}, "sex": {"categories": ["F", "M"]}}
    width = pipeline.class_embedding.config.token_dim
    pipeline.register_modules(condition_embedding=ConditionEmbedding(about, width))
    write_model_card(tmp_path / "README.md", "me/m", pipeline, own_run, listings, report, None, [])
    card = (tmp_path / "README.md").read_text()
    assert "| conditions beside the class | age (55 to 90), sex (F/M) |" in card
    assert 'pipeline("AD", conditions={…})' in card


def test_settings_left_out_of_the_card_exist():
    """A setting that is renamed must be renamed there as well, or its path is published."""
    assert NOT_METHOD <= {field.name for field in dataclasses.fields(TrainLDMConfig)}
