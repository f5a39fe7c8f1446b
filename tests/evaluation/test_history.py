"""The history of a model: which cohorts it was trained on, and which of them are at hand."""

import dataclasses

import pytest

from adni_ldm.data.provenance import describe_data, training_records
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.errors import UserError
from adni_ldm.evaluation.history import check_held_out, find_model, open_cohorts, read_history
from adni_ldm.evaluation.privacy import measure_memorization


def describe(folder):
    listing = open_folder(folder)
    return describe_data(listing, read_slices(listing))


@pytest.fixture
def cohorts(ad_nc_folder):
    """A first cohort, and a second whose test set has subject 1001 of the first."""
    first = ad_nc_folder()
    second = ad_nc_folder(
        {
            "train/AD": ["5001", "5002"],
            "train/NC": ["6001", "6002"],
            "test/AD": ["1001"],
            "test/NC": ["7001"],
        },
        name="second",
    )
    return first, second


def history_of(pipeline, unet=(), vae=()):
    pipeline.unet.register_to_config(_trained_on=list(unet))
    pipeline.vae.register_to_config(_trained_on=list(vae))
    return read_history("runs/ldm", pipeline)


def open_folders(folders, history, class_names=("AD", "NC")):
    return open_cohorts([str(one) for one in folders], history, class_names, None, 0.1, 16)


def test_cohorts_that_are_not_at_hand_are_listed_with_the_parts_that_saw_them(pipeline):
    one, two = {"hash": "1" * 64, "ids": ""}, {"hash": "2" * 64, "ids": ""}
    history = history_of(pipeline, unet=[two], vae=[one, two])
    assert history.unseen({"2" * 64}) == ["111111111111 (vae)"]
    assert history.unseen(set()) == ["111111111111 (vae)", "222222222222 (vae, unet)"]
    assert history.unseen({"1" * 64, "2" * 64}) == []
    assert "not at hand: 111111111111 (vae)" in history.describe(history.unseen({"2" * 64}))


def test_a_history_without_records_of_the_denoiser_is_unknown(pipeline):
    for history in (history_of(pipeline, vae=[{"hash": "1" * 64, "ids": ""}]), read_history("", None, "why")):
        assert history.unseen({"1" * 64}) is None and history.describe(None).startswith("unknown: ")


def test_a_folder_that_the_history_does_not_list_is_refused(pipeline, cohorts):
    first, second = cohorts
    history = history_of(pipeline, training_records(describe(first)))
    (opened,) = open_folders([first], history)
    assert len(opened.train) == 2 * len(describe(first).subjects["train"])
    hashes = describe(second).hash[:12], describe(first).hash[:12]
    with pytest.raises(UserError, match=f"also_trained_on .*{hashes[0]}.* runs/ldm was .*{hashes[1]}"):
        open_folders([second], history)


def test_a_folder_split_in_another_way_than_in_training_is_refused(pipeline, cohorts):
    data = describe(cohorts[0])
    whole = data.subjects["train"] | data.subjects["val"]
    trained_on_all = dataclasses.replace(data, subjects={"train": whole})
    with pytest.raises(UserError, match="of the val subjects"):
        open_folders(cohorts[:1], history_of(pipeline, training_records(trained_on_all)))


def test_a_published_model_is_checked_by_the_folder_of_its_data(pipeline, cohorts):
    """The records of a model on the Hub have no subjects."""
    first, second = cohorts
    records = training_records(describe(first))
    history = history_of(pipeline, [record | {"ids": "", "slices": ""} for record in records])
    check_held_out(history, describe(second), [])
    with pytest.raises(UserError, match=r"also_trained_on .*1 of the test subjects .*\(1001\)"):
        check_held_out(history, describe(second), open_folders([first], history))


def test_slices_of_a_class_that_is_not_evaluated_are_kept_without_a_label(pipeline, ad_nc_folder):
    """Copies of slices of MCI are found too; the model, which has no such class, has no loss on them."""
    places = {f"train/{name}": [f"{k}001", f"{k}002"] for k, name in enumerate(("AD", "MCI", "NC"), start=1)}
    folder = ad_nc_folder(places)
    listing = open_folder(folder, ("AD", "MCI", "NC"))
    records = training_records(describe_data(listing, read_slices(listing)))
    (cohort,) = open_folders([folder], history_of(pipeline, records), ("NC", "AD"))
    labels = dict(zip(cohort.train.subjects, cohort.train.labels.tolist(), strict=True))
    by_first_digit = {name[0]: label for name, label in labels.items()}
    assert by_first_digit == {"1": 1, "2": -1, "3": 0}
    samples = held_out = cohort.train.take(cohort.train.labels >= 0)
    found = measure_memorization(samples, cohort.train, held_out, pipeline)
    assert found.metrics["membership_auc"].note.startswith("2 training and 2 held-out subjects")


def test_the_model_is_found_beside_the_samples_wherever_the_command_runs(tmp_path, monkeypatch):
    model, samples = tmp_path / "project/runs/ldm", tmp_path / "project/out/samples"
    for folder in (model, samples, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (model / "model_index.json").touch()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_model("runs/ldm", samples) == model
    assert find_model("runs/ldm", "../project/out/samples") == model
    assert find_model(str(model), samples) == model
    assert find_model("someone/model", samples) is None and find_model("", samples) is None
