"""Fine-tuning: RGB autoencoders, other classes, frozen parts, and LoRA."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file

import train_ldm
import train_vae
from adni_ldm.config import TrainLDMConfig, parse_config
from adni_ldm.errors import UserError
from adni_ldm.generation import hash_pipeline
from adni_ldm.loading import load_autoencoder
from adni_ldm.models import ClassEmbedding, build_autoencoder, build_denoiser
from adni_ldm.pipeline import ClassConditionalLDMPipeline
from adni_ldm.training.run import TrainingRun

COMMON = ("--image_size", 16, "--batch_size", 4, "--warmup_steps", 0, "--log_steps", 1)
COMMON += ("--mixed_precision", "no", "--report_to", "none", "--checkpointing_steps", 0)
LDM = (*COMMON, "--validation_steps", 0, "--learning_rate", 1e-3, "--max_steps", 2)
STILL = ("--max_steps", 1, "--learning_rate", 1e-12)
RECORD = {"hash": "0" * 64, "hash_of": "names", "ids": "0123456789abcdef"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline of AD and NC at 16 px, trained on one cohort by its own account."""
    torch.manual_seed(0)
    vae = build_autoencoder(16, widths=(16, 32))
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    unet = build_denoiser(4, 8, widths=(32, 64), token_dim=16, layers_per_block=1)
    unet.register_to_config(_trained_on=[RECORD])
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    folder = tmp_path_factory.mktemp("base")
    ClassConditionalLDMPipeline(vae, unet, ClassEmbedding(token_dim=16), scheduler).save_pretrained(folder)
    return folder


def draw(pipeline, *classes):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(list(classes), 3, generator=generator, output_type="pt", guidance_scale=2.0).images


def load(folder):
    return ClassConditionalLDMPipeline.from_pretrained(folder)


# ---- The autoencoder ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colour():
    """As Stable Diffusion's, small: three channels, convolutions about the latent, attention, a scale."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.18215,
        sample_size=512,
    ).eval()


@pytest.mark.parametrize("place", ["", "vae"])
def test_an_autoencoder_of_colour_is_folded_to_what_it_does_to_grey(place, colour, tmp_path):
    colour.save_pretrained(tmp_path / place)
    folded = load_autoencoder(str(tmp_path))
    grey = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        expected, posterior = (
            vae.encode(images).latent_dist
            for vae, images in ((colour, grey.expand(-1, 3, -1, -1)), (folded, grey))
        )
        assert torch.allclose(posterior.mean, expected.mean, atol=1e-5)
        assert torch.allclose(posterior.logvar, expected.logvar, atol=1e-5)
        decoded, pictures = folded.decode(expected.mean).sample, colour.decode(expected.mean).sample
    assert decoded.shape == (2, 1, 16, 16)
    assert torch.allclose(decoded, pictures.mean(dim=1, keepdim=True), atol=1e-5)
    assert pictures.std(dim=1).max() > 1e-2, "the original decodes to colour"
    folded.save_pretrained(tmp_path / "folded")
    assert weights_equal(AutoencoderKL.from_pretrained(tmp_path / "folded"), folded), "and is saved as grey"


def weights_equal(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(*pair, atol=1e-6) for pair in pairs)


def test_train_vae_goes_on_from_an_autoencoder_of_colour(colour, phantom_dir, run, tmp_path):
    colour.save_pretrained(tmp_path / "sd/vae")
    places = ("--data_dir", phantom_dir, "--output_dir", tmp_path / "vae")
    run(train_vae, "--init_from", tmp_path / "sd", *places, *COMMON, *STILL)
    tuned = load_autoencoder(str(tmp_path / "vae"))
    assert weights_equal(tuned, load_autoencoder(str(tmp_path / "sd")))
    assert tuned.config.scaling_factor == 1 and len(tuned.config.latents_mean) == 4


def test_a_pipeline_goes_on_with_its_autoencoder_tuned_to_other_slices(base, phantom_dir, run, tmp_path):
    data, moving = ("--data_dir", phantom_dir), ("--max_steps", 2, "--learning_rate", 1e-3)
    run(train_vae, "--init_from", base, *data, "--output_dir", tmp_path / "vae", *COMMON, *moving)
    words = ("--init_from", base, *data, *LDM, *STILL)
    run(train_ldm, *words, "--vae", tmp_path / "vae", "--output_dir", tmp_path / "tuned")
    before, tuned = load(base), load(tmp_path / "tuned")
    assert weights_equal(tuned.vae, load_autoencoder(str(tmp_path / "vae")))
    assert not weights_equal(tuned.vae, before.vae) and weights_equal(tuned.unet, before.unet)

    other = build_autoencoder(16, widths=(16, 32), latent_channels=8)
    other.register_to_config(latents_mean=[0.0] * 8, latents_std=[1.0] * 8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="--vae: its latents have 8 channels"):
        run(train_ldm, *words, "--vae", tmp_path / "other", "--output_dir", tmp_path / "odd")


def test_sampling_settings_are_by_default_those_of_the_pipeline_tuned_from(base, phantom_dir, run, tmp_path):
    """They are what validation and online evaluation sample with, and what is saved."""
    own = {"num_inference_steps": 3, "guidance_scale": 2.0, "eta": 0.5}
    ClassConditionalLDMPipeline.from_pretrained(base, **own).save_pretrained(tmp_path / "start")
    words = ("--init_from", tmp_path / "start", "--data_dir", phantom_dir, *LDM, *STILL)
    words += ("--evaluation_steps", 1, "--evaluate_images", 20, "--classifier_steps", 2)
    run(train_ldm, *words, "--guidance_scale", 1, "--output_dir", tmp_path / "tuned")
    for folder in ("tuned", "tuned/best"):
        assert load(tmp_path / folder).sampling_settings() == own | {"guidance_scale": 1}


def test_what_is_no_autoencoder_of_slices_is_refused(phantom_dir, base, run, tmp_path):
    build_autoencoder(16, widths=(16, 32)).save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae/config.json").read_text())
    AutoencoderKL.from_config(config | {"in_channels": 2}).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match="2 input and 1 output channels"):
        load_autoencoder(str(tmp_path / "two"))
    with pytest.raises(UserError, match="'UNet2DConditionModel' is not AutoencoderKL"):
        load_autoencoder(str(base / "unet"))
    places = ("--data_dir", phantom_dir, "--output_dir", tmp_path / "ldm")
    with pytest.raises(UserError, match="its latents are not measured"):
        run(train_ldm, "--vae", tmp_path / "vae", *places, *LDM)


# ---- Classes and size --------------------------------------------------------------------------------------


def test_classes_keep_their_tokens_by_name():
    embedding = ClassEmbedding(("AD", "NC"), token_dim=8)
    grown = embedding.with_classes(("MCI", "NC"))
    assert list(grown.config.class_names) == ["MCI", "NC", "AD"], "the data's labels come first"
    tokens = {name: grown(torch.tensor(grown.labels_of(name))).tokens for name in ("AD", "NC", "MCI")}
    for name in ("AD", "NC"):
        assert torch.equal(tokens[name], embedding(torch.tensor(embedding.labels_of(name))).tokens)
    null = embedding(torch.tensor([2])).tokens
    assert torch.equal(tokens["MCI"], null) and torch.equal(grown(torch.tensor([3])).tokens, null)


def test_more_classes_at_another_size(base, ad_nc_folder, run, tmp_path):
    subjects = {"train/NC": ["1", "2"], "train/MCI": ["3", "4"], "train/AD": ["5", "6"]}
    subjects |= {f"test/{name}": [str(number)] for number, name in enumerate(("NC", "MCI", "AD"), start=7)}
    places = ("--data_dir", ad_nc_folder(subjects), "--output_dir", tmp_path / "tuned", "--val_fraction", 0.4)
    words = ("--init_from", base, "--classes", "NC,MCI,AD", *places, *LDM, *STILL, "--image_size", 32)
    run(train_ldm, *words)
    tuned, before = load(tmp_path / "tuned"), load(base)
    assert list(tuned.class_embedding.config.class_names) == ["NC", "MCI", "AD"]
    assert weights_equal(tuned.unet, before.unet)
    table, old = tuned.class_embedding.table.weight, before.class_embedding.table.weight
    assert torch.allclose(table, old[[1, 2, 0, 2]], atol=1e-6)
    assert draw(tuned, "MCI").shape == (1, 1, 32, 32)
    assert [record["hash"] for record in tuned.unet.config["_trained_on"]][0] == RECORD["hash"]
    assert len(tuned.unet.config["_trained_on"]) == 2, "and this cohort's own"
    with pytest.raises(UserError, match="multiple of 2"):
        run(train_ldm, *words, "--image_size", 30, "--output_dir", tmp_path / "odd")


# ---- Parts -------------------------------------------------------------------------------------------------


def test_frozen_parts_stay_and_the_others_move(base, phantom_dir, run, tmp_path):
    places = ("--init_from", base, "--data_dir", phantom_dir, "--output_dir", tmp_path / "tuned")
    run(train_ldm, *places, *LDM, "--freeze", "unet.down*", "unet.mid*", "class_embedding.*")
    before, after = (
        load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (base, tmp_path / "tuned")
    )
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"conv_in", "time_embedding", "up_blocks", "conv_norm_out", "conv_out"}
    tables = [load(folder).class_embedding.table.weight for folder in (base, tmp_path / "tuned")]
    assert torch.equal(*tables)


KEYS_AND_VALUES = ("--freeze", "unet.*", "!*.attn2.to_[kv].*")


def test_keys_and_values_of_cross_attention_alone(base, phantom_dir, run, tmp_path):
    """As Custom Diffusion (arXiv:2212.04488), and the class tokens; the preset says the same."""
    places = ("--init_from", base, "--data_dir", phantom_dir, "--output_dir", tmp_path / "tuned")
    run(train_ldm, *places, *LDM, *KEYS_AND_VALUES)
    before, after = (
        load_file(f / "unet/diffusion_pytorch_model.safetensors") for f in (base, tmp_path / "tuned")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "attn2.to_k." in name or "attn2.to_v." in name} != set()
    preset = parse_config(TrainLDMConfig, "", ["--config", "configs/finetune/keys_and_values.yaml"])
    assert ("--freeze", *preset.freeze) == KEYS_AND_VALUES


@pytest.mark.parametrize("part", [("--lora_rank", 2), KEYS_AND_VALUES])
def test_frozen_weights_in_half_precision(part, base, phantom_dir, run, tmp_path, monkeypatch):
    """Half the bytes while training; what is saved is float32, and as trained in float32 up to rounding."""
    words = ("--init_from", base, "--data_dir", phantom_dir, *LDM, *part, "--mixed_precision", "bf16")
    prepare = TrainingRun.prepare
    frozen = []

    def spy(run, denoiser, **options):
        weights = [p for p in denoiser.unet.parameters() if not p.requires_grad and p.ndim > 1]
        frozen.append({weight.dtype for weight in weights})
        assert {weight.dtype for weight in denoiser.parameters() if weight.requires_grad} == {torch.float32}
        prepare(run, denoiser, **options)

    monkeypatch.setattr(TrainingRun, "prepare", spy)
    run(train_ldm, *words, "--output_dir", tmp_path / "float")
    run(train_ldm, *words, "--half_frozen", "--validation_steps", 1, "--output_dir", tmp_path / "half")
    assert frozen == [{torch.float32}, {torch.bfloat16}]
    whole, half = (load(tmp_path / name) for name in ("float", "half"))
    saved = load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    pairs = list(zip(whole.unet.parameters(), half.unet.parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in pairs)
    with pytest.raises(UserError, match="--half_frozen: .*--mixed_precision"):
        run(train_ldm, *words, "--half_frozen", "--mixed_precision", "no", "--output_dir", tmp_path / "no")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--freeze", "unet.down*", "unet.mid"),
            r"--freeze unet.mid: matches no whole name of a weight; there are .*unet\.mid_block",
        ),
        (("--freeze", "unet.*", "class_embedding.*"), "nothing is left to train"),
        (("--lora_rank", -1), "--lora_rank -1"),
    ],
)
def test_what_cannot_be_trained_is_reported(words, message, base, phantom_dir, run, tmp_path):
    places = ("--data_dir", phantom_dir, "--output_dir", tmp_path / "tuned")
    with pytest.raises(UserError, match=message):
        run(train_ldm, "--init_from", base, *places, *LDM, *words)
    assert not list((tmp_path / "tuned").glob("[!.]*")), "nothing but the lock of the folder"


def test_nothing_is_frozen_without_a_model_to_go_on_from(phantom_dir, run, tmp_path):
    for words in (("--freeze", "unet.*"), ("--lora_rank", 2), ("--half_frozen",)):
        with pytest.raises(UserError, match=f"{words[0]}: .*--init_from"):
            run(train_ldm, "--data_dir", phantom_dir, "--output_dir", tmp_path / "out", *LDM, *words)


# ---- LoRA --------------------------------------------------------------------------------------------------


def test_a_lora_without_peft_is_refused_with_the_command(phantom_dir, base, run, tmp_path, monkeypatch):
    monkeypatch.setattr("adni_ldm.training.finetuning.find_spec", lambda name: None)
    words = ("--data_dir", phantom_dir, "--output_dir", tmp_path / "out", *LDM, "--lora_rank", 2)
    with pytest.raises(UserError, match=r"pip install 'adni-ldm\[lora\]'"):
        run(train_ldm, "--init_from", base, *words)


WITHOUT_PEFT = """
import sys
for name in ("adni_ldm", "peft", "accelerate", "transformers", "datasets"):
    sys.modules[name] = None  # as where they are not installed
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipeline(["AD", "MCI"], 3, generator=generator, output_type="pt", guidance_scale=2.0).images
torch.save(images, sys.argv[2])
"""


@pytest.fixture(scope="module")
def lora_data(tmp_path_factory):
    from tests.conftest import write_ad_nc

    subjects = {f"train/{name}": [str(10 + k), str(20 + k)] for k, name in enumerate(("AD", "NC", "MCI"))}
    subjects |= {f"test/{name}": [str(30 + k)] for k, name in enumerate(("AD", "NC", "MCI"))}
    return write_ad_nc(tmp_path_factory.mktemp("lora") / "data", subjects)


@pytest.fixture
def lora_words(base, lora_data):
    words = ("--init_from", base, "--data_dir", lora_data, "--val_fraction", 0.4, "--classes", "AD,NC,MCI")
    return (*words, *LDM, "--max_steps", 4, "--lora_rank", 2)


def test_a_lora_is_a_small_file_that_the_pipeline_takes(base, lora_words, run, tmp_path):
    run(train_ldm, *lora_words, "--output_dir", tmp_path / "tuned")
    tuned, pipeline = load(tmp_path / "tuned"), load(base)
    file = tmp_path / "tuned/pytorch_lora_weights.safetensors"
    assert file.stat().st_size < 0.2 * (base / "unet/diffusion_pytorch_model.safetensors").stat().st_size
    assert not any("lora" in name for name in tuned.unet.state_dict()), "merged: a plain U-Net"
    before, expected = draw(pipeline, "AD", "NC"), draw(tuned, "AD", "MCI")
    untouched = hash_pipeline(pipeline)

    pipeline.load_lora_weights(tmp_path / "tuned", adapter_name="scanner")
    assert list(pipeline.class_embedding.config.class_names) == ["AD", "NC", "MCI"]
    assert torch.allclose(draw(pipeline, "AD", "MCI"), expected, atol=1e-4)
    assert pipeline.unet.config["_trained_on"] == tuned.unet.config["_trained_on"]
    full = draw(pipeline, "AD", "NC")
    pipeline.set_adapters("scanner", 0.5)
    half = draw(pipeline, "AD", "NC")
    pipeline.set_adapters("scanner", 0.0)
    none = draw(pipeline, "AD", "NC")
    assert 0 < (half - none).abs().mean() < (full - none).abs().mean()
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline, "AD", "NC"), before) and hash_pipeline(pipeline) == untouched
    assert pipeline.unet.config["_trained_on"] == [RECORD]
    with pytest.raises(ValueError, match="unknown class 'MCI'"):
        draw(pipeline, "MCI")

    # The merged folder can be sampled from where neither this package nor peft is installed.
    words = [str(tmp_path / name) for name in ("tuned", "images.pt")]
    command = [sys.executable, "-c", WITHOUT_PEFT, *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.allclose(torch.load(tmp_path / "images.pt"), expected, atol=1e-5)


def test_a_lora_resumed_is_the_uninterrupted_one_and_no_other(base, lora_words, run, tmp_path):
    words = (*lora_words, "--checkpointing_steps", 2)
    run(train_ldm, *words, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole/checkpoints/step-00000002"
    resume = ("--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", checkpoint)
    run(train_ldm, *words, *resume)
    for name in ("pytorch_lora_weights.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        whole, resumed = (load_file(tmp_path / place / name) for place in ("whole", "resumed"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)

    for changed, named in (
        (("--lora_rank", 3), "--lora_rank was 2, is 3"),
        (("--freeze", "unet.mid*"), r"--freeze was \[\], is \['unet.mid\*'\]"),
        (("--init_from", tmp_path / "whole"), "weights of --init_from was"),
    ):
        with pytest.raises(UserError, match=named):
            run(train_ldm, *words, *resume, "--output_dir", tmp_path / "other", *changed)


@pytest.mark.parametrize(
    "part", [("--freeze", "unet.down_blocks*"), ("--lora_rank", 2), ("--lora_rank", 2, "--use_ema", False)]
)
def test_online_evaluation_of_a_part_that_is_trained(part, run, base, phantom_dir, tmp_path):
    """The EMA holds the trained parameters alone; the best pipeline is whole, LoRA merged."""
    words = ("--init_from", base, "--data_dir", phantom_dir, "--output_dir", tmp_path / "tuned", *LDM, *part)
    words += ("--evaluation_steps", 2, "--evaluate_images", 20, "--classifier_steps", 2)
    run(train_ldm, *words, "--num_inference_steps", 2)
    best, last = load(tmp_path / "tuned/best"), load(tmp_path / "tuned")
    assert hash_pipeline(best) == hash_pipeline(last), "evaluated after the last update"
    assert draw(best, "AD").isfinite().all()
