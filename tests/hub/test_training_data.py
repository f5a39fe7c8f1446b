"""What a push is compared with: all data that the model was trained on, complete, or it is refused."""

import json
import shutil

import pandas as pd
import pytest
from PIL import Image
from stand_ins import blob_image

from adni_ldm.data.manifest import data_hash
from adni_ldm.data.slices import open_folder
from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.hub.leak_scan import index_training_data
from adni_ldm.hub.push import open_training_data, push_dataset, push_model
from adni_ldm.loading import load_pipeline


@pytest.fixture
def own_run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def own_data(phantom_dir, tmp_path):
    """A copy of the training data, of which pictures may be lost."""
    return shutil.copytree(phantom_dir, tmp_path / "data")


@pytest.fixture
def samples(own_run, tmp_path):
    """Two slices as sample.py writes them."""
    run, folder = own_run, tmp_path / "samples"
    rows = []
    for number, label in enumerate(("AD", "NC")):
        (folder / label).mkdir(parents=True)
        blob_image([number], 32, 32).save(folder / label / "000000.png")
        rows.append({"file_name": f"{label}/000000.png", "label": label, "seed": number, "model": str(run)})
    model = load_pipeline(str(run))
    records = model.unet.config["_trained_on"]
    facts = {"model_hash": hash_pipeline(model), "data_hash": "+".join(entry["hash"] for entry in records)}
    pd.DataFrame(rows).assign(**facts).to_csv(folder / "metadata.csv", index=False)
    return folder


def change(samples, **columns):
    path = samples / "metadata.csv"
    pd.read_csv(path, dtype=str).assign(**columns).to_csv(path, index=False)


def test_samples_are_compared_with_the_data_that_they_name(samples, own_data, tmp_path):
    shutil.copyfile(next((own_data / "train/AD").glob("*.png")), samples / "NC/000000.png")
    with pytest.raises(UserError, match="NC/000000.png: identical to the training image train/AD/"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_an_autoencoder_without_a_record_does_not_count(own_run, own_data, tmp_path):
    """As one from elsewhere, on which nothing is known."""
    path = own_run / "vae/config.json"
    config = json.loads(path.read_text())
    del config["_trained_on"]
    path.write_text(json.dumps(config))
    push_model(own_run, "me/brains", [str(own_data)], accept_privacy_risk=True, dry_run=str(tmp_path / "out"))
    assert (tmp_path / "out/README.md").is_file()


def test_data_that_lost_pictures_are_refused(samples, own_data, tmp_path):
    """Their manifest.json still has the recorded hash."""
    for path in sorted((own_data / "train/AD").glob("*.png"))[1:]:
        path.unlink()
    with pytest.raises(UserError, match="is in metadata.csv but missing; restore it"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_data_that_lost_a_class_are_refused(samples, own_run, own_data, tmp_path):
    """Neither the folder nor the samples name it any more, but manifest.json does."""
    for path in own_data.glob("*/metadata.csv"):
        shutil.rmtree(path.parent / "NC")
        table = pd.read_csv(path, dtype=str)
        table[table.file_name.str.startswith("AD/")].to_csv(path, index=False)
    table = pd.read_csv(samples / "metadata.csv", dtype=str)
    table[table.label == "AD"].to_csv(samples / "metadata.csv", index=False)
    (own_run / "training_config.json").unlink()
    with pytest.raises(UserError, match="NC"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_data_whose_pictures_were_replaced_are_refused(samples, own_data, tmp_path):
    path = next((own_data / "train/AD").glob("*.png"))
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # same name, same size
    path.write_bytes(content)
    with pytest.raises(UserError, match="train/AD has changed"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_samples_of_a_model_without_a_record_are_refused(samples, own_data, tmp_path):
    change(samples, data_hash=["", ""])
    with pytest.raises(UserError, match="no data_hash of AD/000000.png.*2 such slices.*sample again"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_the_hash_of_every_row_counts(samples, own_data, tmp_path):
    known = pd.read_csv(samples / "metadata.csv").data_hash[0]
    change(samples, data_hash=[known, "f" * 64])
    with pytest.raises(UserError, match="trained on data with the hash ffffffffffffffff, which is not among"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_samples_that_name_less_than_their_model_was_trained_on_are_refused(
    samples, own_run, own_data, ad_nc_folder, train_part_on, tmp_path
):
    """As those of earlier versions, which named the data of the U-Net alone."""
    train_part_on(own_run, "vae", ad_nc_folder())
    with pytest.raises(UserError, match="does not name the data with the hash .* sample again"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_samples_of_several_models_are_refused(samples, own_data, tmp_path):
    known = pd.read_csv(samples / "metadata.csv").model_hash[0]
    change(samples, model_hash=[known, "0123"])
    with pytest.raises(UserError, match="slices of 2 models, of which a report evaluates one"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["model_hash", "data_hash"])
def test_a_report_on_another_model_or_other_data_opens_no_gate(samples, own_run, own_data, tmp_path, name):
    path = own_run / "report/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "0123"}))
    with pytest.raises(UserError, match="there is no verdict on privacy .*0123.*: run evaluate.py"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["AD/gone.png", "../outside.png", "notes.txt", "AD/../AD/000000.png"])
def test_only_pictures_in_the_folder_are_samples(samples, own_data, tmp_path, name):
    (samples / "notes.txt").write_text("notes")
    Image.new("L", (32, 32)).save(tmp_path / "outside.png")
    change(samples, file_name=[name, "NC/000000.png"])
    with pytest.raises(UserError, match=f"there is no PNG {name} in the folder"):
        push_dataset(samples, "me/slices", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_a_model_without_a_record_is_refused(own_run, own_data, tmp_path):
    path = own_run / "unet/config.json"
    config = json.loads(path.read_text())
    del config["_trained_on"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="its U-Net has no record of its training data"):
        push_model(own_run, "me/brains", [str(own_data)], dry_run=str(tmp_path / "out"))


def test_the_history_of_the_autoencoder_counts(own_run, own_data, ad_nc_folder, train_part_on, tmp_path):
    """Trained on real slices, under a U-Net that was trained on the phantom."""
    real = ad_nc_folder()
    train_part_on(own_run, "vae", real)
    with pytest.raises(UserError, match="which is not among them; give every folder"):
        push_model(own_run, "me/brains", [str(own_data)], dry_run=str(tmp_path / "out"))
    push_model(own_run, "me/brains", [str(own_data), str(real)], dry_run=str(tmp_path / "out"))
    card = (tmp_path / "out/README.md").read_text()
    assert "license_name: adni-data-use-agreement" in card and "synthetic cohort" not in card
    rows = [line for line in card.splitlines() if line.startswith("| train |")]
    assert sum(int(row.split("|")[4]) for row in rows) == len(list(own_data.glob("train/*/*.png"))), (
        "of what the U-Net was trained on"
    )


def test_pictures_of_other_classes_are_compared_too(ad_nc_folder):
    """An earlier model of the history may have been trained on a class that the present one lacks."""
    folder = ad_nc_folder({"train/AD": ["1001"], "train/NC": ["2001"], "train/MCI": ["3001"]})
    (three, _), (two, _) = (
        data_hash(open_folder(folder, names)) for names in (("AD", "MCI", "NC"), ("AD", "NC"))
    )
    assert three != two
    listings = open_training_data([folder], None, {}, ("AD", "NC"), [three, two])
    assert "train/MCI/3001_78.jpeg" in index_training_data(listings, 32).files
    assert listings[-1].class_names == ("AD", "NC")
