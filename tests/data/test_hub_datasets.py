"""Data sets of the datasets library are read like the folder that they were made from."""

import io
import json
import shutil
import signal

import pytest
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk
from PIL import Image

import evaluate
import sample
import train_ldm
import train_vae
from adni_ldm.config import CheckConfig, EvaluateConfig, TrainLDMConfig
from adni_ldm.config.datasets import DatasetConfig
from adni_ldm.data.folder import SUBJECTS_UNKNOWN
from adni_ldm.data.hub_datasets import OPTIONS, as_folder, is_hub_name
from adni_ldm.data.provenance import describe_data, training_records
from adni_ldm.data.qc import check_folder
from adni_ldm.data.slices import open_folder, read_slices
from adni_ldm.data.splits import DataError
from adni_ldm.data.withdrawal import find_traces
from adni_ldm.hub.push import open_training_data
from adni_ldm.loading import load_pipeline

NAMES = ("AD", "NC")


@pytest.fixture(scope="module")
def rows(phantom_dir):
    """The phantom cohort as `imagefolder` loads it, with the columns of its metadata.csv."""
    return load_dataset("imagefolder", data_dir=str(phantom_dir))


@pytest.fixture(scope="module")
def saved(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "set"
    rows.save_to_disk(folder)
    return folder


def contents(folder):
    """{split: [(class, subject, slice, pixels)]} of a folder of slices."""
    listing = open_folder(folder, NAMES)
    splits = read_slices(listing, 0.1)
    return {
        split: sorted(
            (NAMES[row["label"]], row["subject"], row["slice"], row["image"].convert("L").tobytes())
            for row in dataset
        )
        for split, dataset in splits.items()
    }


def conditions_of(folder, names):
    """The conditions of each file of a folder of slices, in order of their values."""
    files = open_folder(folder, NAMES, conditions=names).files
    return sorted(tuple(file.conditions[name] for name in names) for file in files)


def test_a_saved_data_set_is_the_folder_that_it_was_made_from(saved, rows, phantom_dir):
    texts = (Value("string"), Value("large_string"))  # of pandas 2 and 3
    assert set(rows) == {"train", "validation", "test"} and rows["train"].features["label"] in texts
    folder = as_folder(saved, NAMES)
    assert contents(folder) == contents(phantom_dir)
    assert folder.stat().st_mode & 0o077 == 0, "only its owner may read it"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert as_folder(saved, NAMES) == folder
    assert written == {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}, "written once"
    data, own = (describe_data(open_folder(f), read_slices(open_folder(f))) for f in (folder, phantom_dir))
    assert data.subjects == own.subjects and data.slices == own.slices


@pytest.mark.parametrize("kind", ["numbers", "class label", "parquet", "other names"])
def test_labels_columns_and_splits_of_other_data_sets(kind, rows, phantom_dir, tmp_path):
    options = {}
    if kind == "numbers":
        changed = rows.map(lambda row: {"number": NAMES.index(row["label"])})
        changed = changed.remove_columns("label").rename_column("number", "label")
    elif kind == "class label":  # in another order than --classes
        changed = rows.cast_column("label", ClassLabel(names=["NC", "AD"]))
    else:
        changed = rows
    if kind == "other names":
        columns = {"image": "scan", "label": "diagnosis", "subject": "patient"}
        renamed = changed.rename_columns(columns)
        splits = {"train": "a", "validation": "b", "test": "c"}
        changed = DatasetDict({splits[name]: renamed[name] for name in renamed})
        options = {f"{name}_column": other for name, other in columns.items()}
        options |= {"train_split": "a", "val_split": "b", "test_split": "c"}
    if kind == "parquet":
        (tmp_path / "set").mkdir()
        for name, part in changed.items():
            part.to_parquet(tmp_path / f"set/{name}-00000-of-00001.parquet")
    else:
        changed.save_to_disk(tmp_path / "set")
    assert contents(as_folder(tmp_path / "set", NAMES, **options)) == contents(phantom_dir)


def test_one_parquet_file_is_split_by_subject(rows, tmp_path):
    rows["train"].to_parquet(tmp_path / "one.parquet")
    found = contents(as_folder(tmp_path / "one.parquet", NAMES))
    subjects = {split: {row[1] for row in part} for split, part in found.items()}
    assert set(subjects) == {"train", "val"} and not subjects["train"] & subjects["val"]
    assert subjects["train"] | subjects["val"] == set(rows["train"]["subject"])


def test_errors_name_the_columns_splits_and_classes_that_there_are(saved, rows, tmp_path):
    for options, message in (
        ({"image_column": "scan"}, "no column scan in its split train; there are image, .*--image_column"),
        ({"label_column": "group"}, "no column group .* there are image, .*label.*--label_column"),
        ({"subject_column": "who"}, "no column who .*--subject_column, or --no_subjects"),
        ({"image_column": "age"}, "column age holds no images"),
        ({"val_split": "dev"}, "no split dev; there are train, validation, test: name it with --val_split"),
    ):
        with pytest.raises(DataError, match=message):
            as_folder(saved, NAMES, **options)
    with pytest.raises(DataError, match=r"no slices of class MCI; there are AD \(\d+\), NC \(\d+\)"):
        as_folder(saved, ("AD", "MCI", "NC"))
    three = rows["train"].remove_columns("label").add_column("label", [2] * len(rows["train"]))
    three.save_to_disk(tmp_path / "three")
    with pytest.raises(DataError, match="label '2' of row 0 is none of the 2 classes AD, NC"):
        as_folder(tmp_path / "three", NAMES)
    broken = Dataset.from_dict({"image": [{"bytes": b"no", "path": None}], "label": ["AD"], "subject": ["a"]})
    broken.save_to_disk(tmp_path / "broken")
    with pytest.raises(DataError, match="row 0 has no image that can be read"):
        as_folder(tmp_path / "broken", ("AD",))


@pytest.mark.parametrize("label", ["../AD", "/AD", ".AD", ""])
def test_a_label_names_no_other_folder(label, tmp_path):
    picture = io.BytesIO()
    Image.new("L", (4, 4)).save(picture, "PNG")
    image = {"bytes": picture.getvalue(), "path": None}
    rows = {"image": [image] * 2, "label": [label, "AD"], "subject": ["a", "b"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="of row 0 is none of the 1 classes"):
        as_folder(tmp_path / "set", ("AD",))


def small_set(folder, **columns):
    """Four slices, one of each row of the columns, with their images in the data set."""
    contents = []
    for shade in range(4):
        picture = io.BytesIO()
        Image.new("L", (4, 4), 50 * shade).save(picture, "PNG")
        contents.append({"bytes": picture.getvalue(), "path": None})
    columns = {"image": contents, "label": ["AD", "NC"] * 2, "subject": list("abcd")} | columns
    Dataset.from_dict(columns).save_to_disk(folder)
    return folder


def test_subjects_and_slices_of_other_types(tmp_path):
    """Numbers from 0, as pandas has them with a gap, and a ClassLabel's names; a missing one is refused."""
    numbered = small_set(tmp_path / "numbered", subject=[0, 1, 2, 3], slice=[0.0, 1.0, None, -1.0])
    listing = open_folder(as_folder(numbered, NAMES), NAMES)
    assert sorted(file.subject for file in listing.files) == list("0123") and not listing.problems
    some = small_set(tmp_path / "some", image_id=["I7", None, None, None])
    scans = {file.subject: file.scan for file in open_folder(as_folder(some, NAMES), NAMES).files}
    assert scans == {"a": "I7", "b": "b", "c": "c", "d": "d"}, "without an image ID the subject stands for it"
    floats = small_set(tmp_path / "floats", subject=[1.0, 2.0, 3.0, float("nan")])
    with pytest.raises(DataError, match="row 3 has no subject"):
        as_folder(floats, NAMES)
    small_set(tmp_path / "plain", subject=[3, 2, 1, 0])
    coded = load_from_disk(tmp_path / "plain").cast_column("subject", ClassLabel(names=list("wxyz")))
    coded.save_to_disk(tmp_path / "coded")
    files = open_folder(as_folder(tmp_path / "coded", NAMES), NAMES).files
    assert sorted(file.subject for file in files) == list("wxyz")


def test_columns_that_are_no_covariates_are_left_out(tmp_path):
    """Bytes, and text that no CSV cell holds; booleans and missing numbers are kept."""
    more = {
        "mask": [b"x" * 60_000] * 4,
        "report": ["word " * 30_000, "", "", ""],
        "smoker": [True, False] * 2,
    }
    saved = small_set(tmp_path / "set", **more, mmse=[29.0, None, 25.5, float("nan")])
    folder = as_folder(saved, NAMES)
    header = (folder / "train/metadata.csv").read_text().splitlines()[0].split(",")
    assert {"smoker", "mmse"} < set(header) and not {"mask", "report"} & set(header)
    assert conditions_of(folder, ["mmse"]) == [("",), ("",), ("25.5",), ("29.0",)]


def test_a_slice_without_its_subject_is_refused(rows, tmp_path):
    rows["train"].map(lambda row: {"subject": ""}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="row 0 has no subject; complete it, or add --no_subjects"):
        as_folder(tmp_path / "set", NAMES)


def test_without_subjects_every_record_says_so(saved, rows, phantom_dir, tmp_path):
    folder = as_folder(saved, NAMES, no_subjects=True)
    listing = open_folder(folder)
    data = describe_data(listing, read_slices(listing))
    assert not data.subjects_known and any(SUBJECTS_UNKNOWN in note for note in listing.notes)
    assert training_records(data)[-1]["subjects"] == "unknown"
    listing = open_folder(phantom_dir)
    assert "subjects" not in training_records(describe_data(listing, read_slices(listing)))[-1]
    images = [file.subject for file in open_folder(folder).files]
    assert len(set(images)) == len(images) and images[0].startswith("image-")

    # The same image in two splits is found by its content.
    twice = DatasetDict({"train": rows["train"], "test": rows["train"].select(range(2))})
    twice.save_to_disk(tmp_path / "twice")
    report = check_folder(as_folder(tmp_path / "twice", NAMES, no_subjects=True))
    assert any("train and test share" in problem for problem in report.problems)


def test_the_leak_scan_reads_what_was_trained_on(saved):
    """By the settings of the run, whose columns it takes."""
    folder = as_folder(saved, NAMES)
    listing = open_folder(folder)
    digest = describe_data(listing, read_slices(listing)).hash
    settings = {"data_dir": str(saved), "subject_column": "subject", "label_column": "label"}
    assert open_training_data([], None, settings, NAMES, [digest])[-1].root == folder


def test_a_withdrawn_subject_is_found(saved, rows, phantom_dir):
    subject = rows["train"]["subject"][0]
    folder = as_folder(saved, NAMES)
    traces = find_traces(subject, saved, folder=folder)
    kinds = {(trace.kind, trace.path) for trace in traces}
    assert ("data", saved) in kinds and ("cache", folder) in kinds


def test_a_folder_or_zip_is_itself_and_a_missing_path_is_no_name_of_the_hub(phantom_dir, tmp_path):
    assert as_folder(phantom_dir, NAMES) == phantom_dir
    archive = shutil.make_archive(str(tmp_path / "data"), "zip", phantom_dir)
    assert str(as_folder(archive, NAMES)) == archive
    for path in ("data/phantom", "runs/x", str(tmp_path / "a"), "./a/b", "~/a", "tests/missing", "missing"):
        assert not is_hub_name(path)
    assert is_hub_name("me/slices") and is_hub_name("some-group/brain.mri")


def test_every_command_takes_the_same_names():
    assert tuple(DatasetConfig.__dataclass_fields__) == OPTIONS
    for config in (TrainLDMConfig, EvaluateConfig, CheckConfig):
        assert set(config(subject_column="who").dataset_options) == set(OPTIONS)


def test_every_column_of_a_data_set_can_be_a_condition(saved, rows, phantom_dir, tmp_path):
    """As of the folder that it was made from; a ClassLabel by its names, and no subject unless asked for."""
    names = ["age", "sex", "slice_mm", "field_t"]
    own = conditions_of(phantom_dir, names[:3])
    kind = ClassLabel(names=["1.5 T", "3 T"])
    coded = rows.map(lambda row: {"field_t": int(row["sex"] == "F")}).cast_column("field_t", kind)
    coded.save_to_disk(tmp_path / "set")
    folder = as_folder(tmp_path / "set", NAMES)
    assert conditions_of(folder, names[:3]) == own
    assert set(conditions_of(folder, ["sex", "field_t"])) == {("F", "3 T"), ("M", "1.5 T")}
    written = as_folder(tmp_path / "set", NAMES, no_subjects=True) / "train/metadata.csv"
    assert "subject" not in written.read_text().splitlines()[0].split(",")


@pytest.mark.parametrize("no_subjects", [False, True])
def test_a_saved_data_set_goes_through_all_commands(no_subjects, saved, phantom_dir, tmp_path, monkeypatch):
    """Trained on, sampled from, and evaluated against; the report says where subjects are not known."""
    words = ["--no_subjects"] if no_subjects else []
    train = (*words, "--data_dir", saved, "--image_size", 32, "--batch_size", 4, "--max_steps", 1)
    train += ("--report_to", "none", "--checkpointing_steps", 0, "--mixed_precision", "no")

    def run(recipe, *words):
        kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        AcceleratorState._reset_state(True)
        monkeypatch.setattr("sys.argv", [recipe.__name__, *map(str, words)])
        assert not recipe.main()
        AcceleratorState._reset_state(True)
        for number, handler in kept.items():
            signal.signal(number, handler)

    run(train_vae, *train, "--widths", 8, 16, "--output_dir", tmp_path / "vae")
    unet = ("--unet_widths", 32, 64, "--token_dim", 8, "--layers_per_block", 1, "--validation_steps", 0)
    unet += ("--conditions", "age", "sex", "slice_mm")
    run(train_ldm, *train, *unet, "--vae", tmp_path / "vae", "--output_dir", tmp_path / "ldm")
    samples = ("--num_images", 12, "--num_inference_steps", 1, "--mixed_precision", "no")
    run(sample, "--class", "all", *samples, "--model", tmp_path / "ldm", "--output_dir", tmp_path / "samples")
    compare = ("--samples", tmp_path / "samples", "--model", tmp_path / "ldm", "--classifier_steps", 2)
    run(evaluate, *words, "--real", saved, *compare, "--curve_images", 0, "--output_dir", tmp_path / "report")
    metrics = json.loads((tmp_path / "report/metrics.json").read_text())
    assert metrics["subjects_known"] is not no_subjects
    page = (tmp_path / "report/report.html").read_text()
    assert ("share a subject cannot be known" in page) is no_subjects
    pipeline = load_pipeline(str(tmp_path / "ldm"))
    assert ("subjects" in pipeline.unet.config["_trained_on"][0]) is no_subjects
    assert list(pipeline.condition_embedding.names) == ["age", "sex", "slice_mm"]
