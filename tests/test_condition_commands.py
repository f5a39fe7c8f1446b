"""sample.py with conditions: one brain at several values of a condition, counterfactuals of a condition."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from stand_ins import make_condition_embedding, make_pipeline

import sample
from adni_ldm.errors import UserError
from adni_ldm.generation import image_seed
from adni_ldm.pipeline import ClassConditionalLDMPipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditioned")
    make_pipeline(condition_embedding=make_condition_embedding()).save_pretrained(folder)
    return folder


@pytest.fixture
def generate(run, model, tmp_path):
    """sample.py into a new folder, which is returned."""

    def generate(*words, name="out"):
        options = ("--num_inference_steps", 3, "--mixed_precision", "no", "--batch_size", 2)
        run(sample, "--model", model, "--output_dir", tmp_path / name, *options, *words)
        return tmp_path / name

    return generate


# ---- One brain at several values of a condition ------------------------------------------------------------


def test_a_sweep_is_one_brain_at_several_ages(generate, model):
    folder = generate("--class", "all", "--sweep", "age=60:80:3", "--conditions", "sex=F")
    table = pd.read_csv(folder / "metadata.csv")
    assert list(table.age) == [60, 70, 80] * 2 and list(table.label) == ["AD"] * 3 + ["NC"] * 3
    assert set(table.sex) == {"F"} and set(table.eta) == {1} and not table.extrapolated.any()
    assert set(table.seed) == {image_seed(0, 0)}
    pipeline = ClassConditionalLDMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    frames = []
    for row in table.itertuples():
        noise = torch.Generator().manual_seed(image_seed(0, 0))
        asked = {"age": row.age, "sex": "F"}
        (image,) = pipeline(row.label, 3, generator=noise, conditions=asked).images
        frames.append(np.asarray(Image.open(folder / row.file_name)).astype(int))
        assert abs(frames[-1] - np.asarray(image)).max() <= 1, "it differs by what was asked for alone"
    assert all((one != other).any() for one, other in zip(frames, frames[1:]))
    with Image.open(folder / "sweep.gif") as film:
        assert film.size == (32, 16) and film.n_frames == 4, "both classes, there and back, no end twice"
    assert Image.open(folder / "sweep.png").width > 300 and not (folder / "grid.png").exists()


def test_a_sweep_over_categories(generate):
    table = pd.read_csv(generate("--class", "NC", "--sweep", "sex=F,M") / "metadata.csv")
    assert list(table.sex) == ["F", "M"] and table.seed.nunique() == 1


def test_a_sweep_out_of_range_is_marked(generate):
    words = ("--class", "AD", "--sweep", "age=80:100:3")
    with pytest.raises(UserError, match="--sweep: age=100 is outside of the range in training, 55 to 90"):
        generate(*words)
    table = pd.read_csv(generate(*words, "--extrapolate", "true") / "metadata.csv")
    assert list(table.extrapolated) == [False, False, True]


def test_what_was_sampled_by_conditions_is_not_taken_for_samples_without(generate):
    """Nor is a sweep: the images would get the metadata of others."""
    words = ("--class", "AD", "--num_images", 2)
    generate(*words, "--conditions", "age=85")
    with pytest.raises(UserError, match="holds slices of other settings: conditions was .*85.*, is None"):
        generate(*words)
    with pytest.raises(UserError, match="conditions was"):
        generate(*words, "--conditions", "age=84")
    generate("--class", "AD", "--sweep", "age=60:90:2", name="sweep")
    with pytest.raises(UserError, match="sweep was age=60:90:2, is None"):
        generate(*words, name="sweep")


def test_a_table_of_conditions_is_read_as_written(generate, tmp_path):
    """An empty line is a missing value, spaces around a value are none of it."""
    (tmp_path / "rows.csv").write_text("age , sex\n70, F\n,\n80,M\n")
    words = ("--class", "AD", "--num_images", 3, "--conditions", tmp_path / "rows.csv")
    table = pd.read_csv(generate(*words) / "metadata.csv", keep_default_na=False, dtype=str)
    assert list(table.age) == ["70", "", "80"] and list(table.sex) == ["F", "", "M"]
    (tmp_path / "rows.csv").write_text("age\n70\n\n80\n")
    table = pd.read_csv(generate(*words, name="one") / "metadata.csv", keep_default_na=False, dtype=str)
    assert list(table.age) == ["70", "", "80"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--conditions", "age=70", "age=80"), "--conditions age=80: age is given twice"),
        (("--conditions", "age=95"), "outside of the range in training, 55 to 90; extrapolate allows it"),
        (("--sweep", "age=70:70:3"), "give NAME=LOW:HIGH:COUNT"),
        (("--sweep", "age=60:80:2", "--conditions", "rows.csv"), "a sweep is one brain; give --conditions"),
        (("--sweep", "age"), "--sweep age: give NAME=LOW:HIGH:COUNT, such as age=55:90:8"),
        (("--sweep", "age=60:80"), "give NAME=LOW:HIGH:COUNT"),
        (("--sweep", "age=60:80:1"), "give NAME=LOW:HIGH:COUNT"),
        (("--sweep", "age=60:old:3"), "give NAME=LOW:HIGH:COUNT"),
        (("--sweep", "age=60:inf:3"), "give NAME=LOW:HIGH:COUNT"),
        (("--sweep", "sex=F"), "or categories, such as sex=F,M"),
        (("--sweep", "sex=F,X"), "--sweep: sex=X: not one of F, M"),
        (("--sweep", "mmse=9:30:3"), "--sweep: unknown condition 'mmse'"),
        (("--sweep", "age=60:80:3", "--conditions", "age=70"), "--conditions has age as well"),
        (("--sweep", "age=60:80:3", "--match", "data"), "--match: give only one of them"),
        (("--sweep", "age=60:80:3", "--morph", 3), "--morph: give only one of them"),
    ],
)
def test_wrong_sweeps_are_refused(words, message, generate, tmp_path):
    with pytest.raises(UserError, match=message):
        generate(*words)
    assert not (tmp_path / "out").exists()


# ---- Counterfactuals and class interpolation ---------------------------------------------------------------


@pytest.fixture
def scan(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "scan.png")
    return tmp_path / "scan.png"


def test_a_counterfactual_changes_the_class_or_one_condition(generate, model, scan):
    """--to age=85 keeps class and sex, --to AD keeps the conditions."""
    pipeline = ClassConditionalLDMPipeline.from_pretrained(model)
    image = torch.tensor(np.array(Image.open(scan)))[None, None] / 127.5 - 1
    own = {"age": 70, "sex": "F"}
    for word, target, changed in (("age=85", "NC", {"age": 85}), ("AD", "AD", {})):
        words = ("--from_image", scan, "--from", "NC", "--to", word, "--conditions", "age=70", "sex=F")
        folder = generate(*words, name=word)
        expected = pipeline.counterfactual(
            image, "NC", target, 0.8, 3, conditions=own, target_conditions=changed
        )
        found = np.asarray(Image.open(folder / "counterfactual.png")).astype(int)
        assert abs(found - (expected.images[0, 0].numpy() + 1) * 127.5).max() <= 1
        row = pd.read_csv(folder / "metadata.csv").iloc[0]
        assert (row["from"], row.to, row.age, row.sex, row.extrapolated) == ("NC", word, 70, "F", False)


def test_a_morph_keeps_the_conditions(generate, model):
    words = ("--morph", 3, "--from", "NC", "--to", "AD")
    films = [
        (generate(*words, *more, name=name) / "morph.gif").read_bytes()
        for name, more in (("a", ("--conditions", "age=60")), ("b", ("--conditions", "age=85")))
    ]
    assert films[0] != films[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "85"), "--to 85: unknown class '85'.*conditions, for --to NAME=VALUE, age .55 to 90., sex"),
        (("--to", "mmse=20"), "unknown condition 'mmse'"),
        (("--to", "age=95"), "age=95 is outside of the range in training"),
        (("--to", "sex=X"), "sex=X: not one of F, M"),
        (("--to", "AD", "--conditions", "age=95"), "age=95 is outside"),
        (("--to", "AD", "--match", "data"), "--match data is for samples"),
    ],
)
def test_wrong_targets_are_refused(words, message, generate, scan, tmp_path):
    with pytest.raises(UserError, match=message):
        generate("--from_image", scan, "--from", "NC", *words)
    assert not (tmp_path / "out").exists()


def test_a_changed_condition_out_of_range_is_marked(generate, scan):
    words = ("--from_image", scan, "--from", "NC", "--to", "age=95", "--extrapolate", "true")
    assert pd.read_csv(generate(*words) / "metadata.csv").extrapolated.all()
