"""Conditions beside the class: from columns of the data to samples that were asked for by them."""

import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from stand_ins import ABOUT, make_condition_embedding, make_pipeline

import sample
import train_ldm
from adni_ldm.data.conditions import condition_rows, describe_conditions
from adni_ldm.data.slices import CONDITION, load_slices, open_folder, read_slices
from adni_ldm.data.splits import DataError
from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.models import ConditionalDenoiser, ConditionEmbedding
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.training import conditioning, finetuning
from adni_ldm.training.batch_sampling import BatchRandom


@pytest.fixture
def embedding():
    return make_condition_embedding()


@pytest.fixture
def conditioned(embedding):
    return make_pipeline(condition_embedding=embedding)


def images(pipeline, classes=("AD", "NC"), seed=0, steps=3, **options):
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(seed) for _ in classes]
    return pipeline(list(classes), steps, generator=noise, output_type="pt", **options).images


# ---- The embedding -----------------------------------------------------------------------------------------


def test_any_name_and_any_kind_of_number_will_do():
    """apoe.e4 and type, which no module of torch may be called; numbers of NumPy and torch."""
    number = {"mean": 1.0, "std": 1.0, "low": 0.0, "high": 2.0}
    made = ConditionEmbedding({"apoe.e4": number, "type": {"categories": ["a", "b"]}, "keys": number}, 16)
    assert made(made.rows_of({"apoe.e4": 1, "type": "b"}, 2)).tokens.shape == (2, 3, 16)
    for value in (np.int64(2), torch.tensor(2), np.array(2.0), 2):
        assert made.rows_of({"keys": value}, 2)[:, 2].tolist() == [2, 2]


def test_a_missing_value_has_the_null_token_and_nothing_else(embedding):
    rows = torch.tensor([[75.0, 1.0], [math.nan, 1.0], [math.nan, math.nan]])
    tokens = embedding(rows).tokens  # (3, 2, 16)
    assert tokens.shape == (3, 2, 16)
    assert torch.equal(tokens[2], embedding.null.weight)
    assert torch.equal(tokens[1, 0], embedding.null.weight[0]) and torch.equal(tokens[1, 1], tokens[0, 1])
    assert not torch.allclose(tokens[0, 0], embedding.null.weight[0])
    assert not torch.equal(*embedding(torch.tensor([[75.0, 0.0], [76.0, 0.0]])).tokens[:, 0])


def test_conditions_are_told_by_name_and_new_ones_begin_at_null(embedding):
    more = {"sex": {"categories": ["M", "X"]}, "mmse": {"mean": 25.0, "std": 3.0, "low": 9.0, "high": 30.0}}
    more["age"] = {"mean": 40.0, "std": 5.0, "low": 30.0, "high": 60.0}
    grown = embedding.with_conditions(more)
    assert grown.names == ["age", "sex", "mmse"]
    assert grown.config.conditions["sex"] == {"categories": ["F", "M", "X"]}
    assert grown.config.conditions["age"] == {"mean": 70.0, "std": 8.0, "low": 30.0, "high": 90.0}
    own = embedding(torch.tensor([[61.0, 1.0]])).tokens
    tokens = grown(torch.tensor([[61.0, 1.0, 20.0], [61.0, 2.0, math.nan]])).tokens
    assert torch.allclose(tokens[:1, :2], own, atol=1e-6), "what was learned is kept"
    assert torch.equal(tokens[0, 2], tokens[1, 2]) and torch.equal(tokens[0, 2], grown.null.weight[2])
    assert torch.equal(tokens[1, 1], grown.null.weight[1])
    with pytest.raises(ValueError, match="'sex'"):
        embedding.with_conditions({"sex": ABOUT["age"]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": 70}, r"unknown condition 'weight'.*age \(55 to 90\), sex \(F/M\)"),
        ({"age": 91}, "age=91 is outside of the range in training, 55 to 90"),
        ({"age": "old"}, "age=old: not a number"),
        ({"age": math.inf}, "age=inf is outside"),
        ({"sex": "X"}, "sex=X: not one of F, M"),
        ({"age": [70, 71, 72]}, "3 values for 2 images"),
    ],
)
def test_what_was_not_trained_is_refused(given, message, conditioned):
    with pytest.raises(ValueError, match=message):
        images(conditioned, conditions=given)


def test_dropout_hides_all_with_the_label_and_each_by_itself():
    rng = BatchRandom(0, 0, 4000, 0, 1, torch.device("cpu"))
    rows, dropped = torch.ones(4000, 2), torch.arange(4000) < 400
    hidden = conditioning.drop(rows, dropped, rng, rate=0.25).isnan()
    assert hidden[:400].all()
    shares = hidden[400:].float().mean(0)
    assert ((shares - 0.25).abs() < 0.03).all()
    both = hidden[400:].all(1).float().mean()
    assert abs(both - 0.25**2) < 0.02, "each by itself"
    assert conditioning.drop(None, dropped, rng, 0.25) is None


# ---- The pipeline ------------------------------------------------------------------------------------------


def test_a_conditioned_pipeline_loads_where_the_package_is_not(conditioned, tmp_path):
    conditioned.save_pretrained(tmp_path)
    asked = {"age": [60, "90+"], "sex": "F"}
    expected = images(conditioned, conditions=asked)
    alone = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(alone.condition_embedding).__module__.startswith("diffusers_modules")
    for loaded in (alone, ClassConditionalLDMPipeline.from_pretrained(tmp_path)):
        assert torch.equal(images(loaded, conditions=asked), expected)
        assert loaded.condition_embedding.config.conditions == ABOUT
    assert not torch.equal(expected, images(conditioned)), "the conditions have an effect"
    assert torch.equal(images(conditioned, conditions={"age": None, "sex": ""}), images(conditioned))


def test_a_model_without_conditions_stays_as_it_is(tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    assert not (tmp_path / "condition_embedding").exists()
    loaded = ClassConditionalLDMPipeline.from_pretrained(tmp_path)
    assert loaded.condition_embedding is None and torch.equal(images(loaded), images(pipeline))
    with pytest.raises(ValueError, match="without conditions"):
        images(loaded, conditions={"age": 70})


def test_guidance_strengthens_the_class_alone(conditioned, monkeypatch):
    seen = []
    predict = conditioned.unet.forward
    monkeypatch.setattr(
        conditioned.unet,
        "forward",
        lambda *args, **kwargs: seen.append(kwargs["encoder_hidden_states"]) or predict(*args, **kwargs),
    )
    for every in (False, True):
        asked = {"conditions": {"age": 60}, "guide_conditions": every, "guidance_scale": 2.0}
        images(conditioned, steps=1, **asked)
    (alone, everything), null = seen, conditioned.condition_embedding.null.weight
    assert torch.equal(alone[:2, 2:], alone[2:, 2:]), "both branches keep the conditions"
    assert not torch.equal(alone[:2, :2], alone[2:, :2])
    assert torch.equal(everything[0, 2:], null) and not torch.equal(everything[2, 2:], null)


def test_a_counterfactual_keeps_or_changes_a_condition(conditioned):
    image = torch.linspace(-1, 1, 256).view(1, 1, 16, 16)
    options = {"source": "NC", "target": "NC", "num_inference_steps": 4, "guidance_scale": 1.0}
    kept = conditioned.counterfactual(image, conditions={"age": 60}, **options)
    assert torch.equal(kept.images, kept.round_trip), "nothing was changed"
    older = conditioned.counterfactual(
        image, conditions={"age": 60}, target_conditions={"age": 85}, **options
    )
    assert torch.equal(older.round_trip, kept.round_trip) and not torch.equal(older.images, kept.images)


# ---- The data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["age", "Age", "AGE_AT_SCAN", "AgeAtScan", "Subject Age", "entry_age"])
def test_ages_above_89_are_joined_and_missing_values_stay_missing(name):
    columns = {name: ["71", "", "95", "90+"], "site": ["a", "b", "", "a"]}
    about = describe_conditions(columns)
    assert about[name]["high"] == 90 and about[name]["low"] == 71
    assert math.isclose(about[name]["mean"], (71 + 90 + 90) / 3)
    rows = condition_rows(about, {**columns, "site": ["a", "c", "", "b"]}, 4)
    expected = [[71, 0], [math.nan, math.nan], [90, math.nan], [90, 1]]
    np.testing.assert_array_equal(rows.numpy(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["5", "5", ""], "the same in all training slices"),
        (["70", "70.0"], "the same in all training slices"),
        (["", "", ""], "missing"),
        ([f"name {number}" for number in range(33)], "33 different values, such as 'name 0'"),
    ],
)
def test_columns_that_are_no_conditions_are_refused(values, message):
    with pytest.raises(DataError, match=f"--conditions x: .*{message}"):
        describe_conditions({"x": values})


@pytest.mark.parametrize("name", ["seed", "scheduler", "label", "extrapolated", "to"])
def test_a_column_of_what_sample_py_writes_is_no_condition(name):
    with pytest.raises(DataError, match=f"--conditions {name}: samples have a column of that name"):
        describe_conditions({name: ["1", "2"]})


def test_columns_come_from_metadata_and_the_study_table(phantom_dir, ad_nc_folder, tmp_path):
    splits = read_slices(open_folder(phantom_dir, conditions=["age", "slice_mm"]))
    table = pd.read_csv(phantom_dir / "train/metadata.csv", dtype=str).set_index("file_name")
    for row in splits["train"].select(range(3)).cast_column("image", splits["train"].features["image"]):
        name = f"{('AD', 'NC')[row['label']]}/{row['subject']}_{row['slice']:02d}.png"
        assert row[f"{CONDITION}age"] == table.age[name]
        assert row[f"{CONDITION}slice_mm"] == table.slice_mm[name]
    with pytest.raises(DataError, match="--conditions mmse: no such column.*age.*slice_mm"):
        open_folder(phantom_dir, conditions=["mmse"])

    folder = ad_nc_folder()
    scans = [path.stem.split("_")[0] for path in sorted(folder.rglob("*_78.jpeg"))]
    study = pd.DataFrame({"Image Data ID": scans, "Subject": [f"s{scan}" for scan in scans]})
    study["Age"], study["APOE"] = range(60, 60 + len(scans)), ["e3", "e4"] * (len(scans) // 2)
    study.to_csv(tmp_path / "study.csv", index=False)
    listing = open_folder(folder, table=tmp_path / "study.csv", conditions=["age", "APOE"])
    found = {file.subject: file.conditions for file in listing.files}
    assert found == {
        row.Subject: {"age": str(row.Age), "APOE": row.APOE} for row in study.itertuples(index=False)
    }
    assert not load_slices(folder)["train"].column_names[-1].startswith(CONDITION)


# ---- The recipes -------------------------------------------------------------------------------------------


def test_from_metadata_to_samples(run, phantom_dir, tmp_path, capsys):
    """Train with conditions, resume, sample with them and with those of real slices, and fine-tune."""
    make_pipeline().save_pretrained(tmp_path / "base")
    common = ("--data_dir", phantom_dir, "--image_size", 16, "--batch_size", 4, "--warmup_steps", 0)
    common += ("--mixed_precision", "no", "--report_to", "none", "--log_steps", 1, "--learning_rate", 1e-2)
    common += ("--vae", tmp_path / "base", "--unet_widths", 32, 64, "--layers_per_block", 1)
    common += ("--token_dim", 16, "--max_steps", 4, "--checkpointing_steps", 2)
    named = ("--conditions", "age", "sex")
    ldm = tmp_path / "ldm"
    run(train_ldm, *common, *named, "--validation_steps", 2, "--output_dir", ldm)
    whole = ClassConditionalLDMPipeline.from_pretrained(ldm)
    embedding = whole.condition_embedding
    assert embedding.names == ["age", "sex"]
    assert embedding.learned[0].linear_2.weight.abs().max() > 0, "it was trained"
    first = "checkpoints/step-00000002"
    shutil.copytree(ldm / first, tmp_path / "second" / first)
    run(train_ldm, *common, *named, "--validation_steps", 2, "--output_dir", tmp_path / "second",
        "--resume_from_checkpoint", "latest")  # fmt: skip
    resumed = ClassConditionalLDMPipeline.from_pretrained(tmp_path / "second")
    for part in ("unet", "condition_embedding"):
        pairs = zip(getattr(whole, part).parameters(), getattr(resumed, part).parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)

    options = ("--model", ldm, "--num_images", 4, "--num_inference_steps", 2, "--mixed_precision", "no")
    about = embedding.config.conditions["age"]
    age = round((about["low"] + about["high"]) / 2)
    run(sample, *options, "--output_dir", tmp_path / "asked", "--conditions", f"age={age}", "sex=F")
    rows = pd.read_csv(tmp_path / "asked/metadata.csv")
    assert set(rows.age) == {age} and set(rows.sex) == {"F"} and not rows.extrapolated.any()
    run(sample, *options, "--output_dir", tmp_path / "matched", "--match", phantom_dir,
        "--match_split", "train")  # fmt: skip
    rows = pd.read_csv(tmp_path / "matched/metadata.csv")
    real = pd.read_csv(phantom_dir / "train/metadata.csv")
    known = set(zip(real.label, real.age, real.sex))
    assert set(zip(rows.label, rows.age, rows.sex)) <= known, "joint values of real slices of the class"
    with pytest.raises(UserError, match="--conditions: age=120 is outside of the range"):
        run(sample, *options, "--output_dir", tmp_path / "old", "--conditions", "age=120")
    run(
        sample, *options, "--output_dir", tmp_path / "old", "--conditions", "age=120", "--extrapolate", "true"
    )
    assert pd.read_csv(tmp_path / "old/metadata.csv").extrapolated.all()
    with pytest.raises(UserError, match="without conditions"):
        run(sample, *options[2:], "--model", tmp_path / "base", "--output_dir", tmp_path / "x",
            "--conditions", "age=70")  # fmt: skip

    tuned = ("--init_from", ldm, "--conditions", "sex", "slice_mm", "--output_dir", tmp_path / "tuned")
    run(train_ldm, *common, *tuned, "--validation_steps", 0)
    loaded = ClassConditionalLDMPipeline.from_pretrained(tmp_path / "tuned")
    assert loaded.condition_embedding.names == ["age", "sex", "slice_mm"]


def test_a_lora_carries_its_conditions(run, phantom_dir, tmp_path):
    """Loaded over a base without conditions it gives what the merged pipeline gives; unloading undoes it."""
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    make_pipeline().save_pretrained(base)
    words = ("--init_from", base, "--data_dir", phantom_dir, "--image_size", 16, "--batch_size", 4)
    words += ("--warmup_steps", 0, "--mixed_precision", "no", "--report_to", "none", "--learning_rate", 1e-2)
    words += ("--max_steps", 3, "--validation_steps", 0, "--lora_rank", 2, "--conditions", "age", "sex")
    run(train_ldm, *words, "--output_dir", tuned)
    merged, pipeline = (ClassConditionalLDMPipeline.from_pretrained(folder) for folder in (tuned, base))
    before, untouched = images(pipeline), hash_pipeline(pipeline)
    about = merged.condition_embedding.config.conditions["age"]
    asked = {"age": [about["low"], about["high"]], "sex": ["F", "M"]}

    pipeline.load_lora_weights(tuned)
    assert pipeline.condition_embedding.config.conditions == merged.condition_embedding.config.conditions
    pairs = zip(
        pipeline.condition_embedding.state_dict().values(), merged.condition_embedding.state_dict().values()
    )
    assert all(torch.equal(*pair) for pair in pairs)
    expected = images(merged, conditions=asked)
    assert torch.allclose(images(pipeline, conditions=asked), expected, atol=1e-4)
    assert not torch.allclose(images(pipeline), expected, atol=1e-4), "the conditions count"
    pipeline.unload_lora_weights()
    assert pipeline.condition_embedding is None and hash_pipeline(pipeline) == untouched
    assert torch.equal(images(pipeline), before)


def test_a_lora_whose_conditions_do_not_fit_is_refused_and_leaves_the_pipeline(conditioned, tmp_path):
    denoiser = ConditionalDenoiser(
        conditioned.unet, conditioned.class_embedding, conditioned.condition_embedding
    )
    finetuning.add_lora(denoiser.unet, 2)
    finetuning.save_lora(denoiser, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as opened:
        weights, metadata = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    damaged = {name: value for name, value in weights.items() if "conditions.null" not in name}
    save_file(damaged, file, metadata)
    plain = make_pipeline()
    before = hash_pipeline(plain)
    with pytest.raises(ValueError, match="not a LoRA of this pipeline"):
        plain.load_lora_weights(tmp_path)
    assert plain.condition_embedding is None and hash_pipeline(plain) == before
    assert not any("lora" in name for name in plain.unet.state_dict())


def test_the_denoiser_reads_class_tokens_then_conditions(conditioned):
    denoiser = ConditionalDenoiser(
        conditioned.unet, conditioned.class_embedding, conditioned.condition_embedding
    )
    noisy, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    rows = torch.tensor([[60.0, 0.0], [math.nan, 1.0]])
    tokens = conditioned.encode_classes(labels, rows)
    assert tokens.shape == (2, 4, 16)
    expected = conditioned.unet(noisy, 5, encoder_hidden_states=tokens).sample
    assert torch.equal(denoiser(noisy, torch.tensor([5, 5]), labels, rows), expected)
