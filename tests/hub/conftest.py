"""A run folder as train_ldm.py writes it, of a tiny untrained model, with a report on it."""

import json

import pytest
from stand_ins import make_pipeline

from adni_ldm.data.provenance import describe_data, training_records
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.generation import hash_pipeline


def write_report(
    run,
    model_hash,
    data_hash,
    good=True,
    text="no slice is nearer to a training image than held-out ones are",
):
    figure = {"value": 12.3, "low": 10.1, "high": 14.9, "reference": 9.8, "note": "lower is better"}
    metrics = {"fidelity": {"fid": figure}, "privacy": {"nearest": figure}, "model_hash": model_hash}
    metrics["data_hash"] = data_hash
    verdicts = {
        name: {"good": True, "text": f"{name} is well"} for name in ("fidelity", "usefulness", "faithfulness")
    }
    metrics["verdicts"] = verdicts | {"privacy": {"good": good, "text": text}}
    (run / "report").mkdir(exist_ok=True)
    (run / "report/metrics.json").write_text(json.dumps(metrics))


def write_run(run, data_dir):
    pipeline = make_pipeline(image_size=32)
    listing = open_folder(data_dir)
    records = training_records(describe_data(listing, read_slices(listing)))
    pipeline.vae.register_to_config(_trained_on=records, _name_or_path="/home/somebody/runs/vae")
    noise = {"deviation": [0.1] * 33, "spectrum": [1.0] * 17}  # the pushed model must keep it
    pipeline.vae.register_to_config(_decoder_noise=noise)
    pipeline.unet.register_to_config(_trained_on=records)
    pipeline.register_to_config(num_inference_steps=3, guidance_scale=1.5, eta=0.5)
    pipeline.save_pretrained(run)

    settings = {
        "data_dir": str(data_dir),
        "classes": "AD,NC",
        "table": None,
        "image_size": 32,
        "max_steps": 6,
    }
    (run / "training_config.json").write_text(
        json.dumps(settings | {"val_fraction": 0.1, "learning_rate": 1e-3})
    )
    (run / "metrics.csv").write_text(
        "step,loss,learning_rate,skipped,val_loss\n2,0.9,0.001,0,\n4,0.8,0.001,0,0.85\n"
    )
    (run / "secret.txt").write_text("not of the model")
    (run / "samples.png").write_bytes(b"not of the push")
    write_report(run, hash_pipeline(pipeline), records[-1]["hash"])
    return run


@pytest.fixture
def train_part_on():
    """Add a folder to the data that a part of a run's model was trained on."""

    def add(run, part, data_dir):
        path = run / part / "config.json"
        config = json.loads(path.read_text())
        listing = open_folder(data_dir)
        records = training_records(describe_data(listing, read_slices(listing)))
        path.write_text(json.dumps(config | {"_trained_on": records + config["_trained_on"]}))

    return add


@pytest.fixture(scope="session")
def trained(phantom_dir, tmp_path_factory):
    """A run folder; not to be written to."""
    return write_run(tmp_path_factory.mktemp("trained"), phantom_dir)
