"""--init_from Stable Diffusion: weights, scale and schedule stay; class tokens take the prompts' place."""

import json
import shutil
import signal
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import PLACES, write_stable_diffusion
from transformers import CLIPTextModel, CLIPTokenizer

import train_ldm
import train_vae
from adni_ldm.config import TrainLDMConfig, parse_config
from adni_ldm.errors import UserError
from adni_ldm.loading import load_autoencoder, load_base, load_pipeline
from adni_ldm.pipeline import normalize_latents

COMMON = ("--image_size", 16, "--batch_size", 4, "--warmup_steps", 0, "--log_steps", 1, "--max_steps", 1)
COMMON += ("--mixed_precision", "no", "--report_to", "none", "--checkpointing_steps", 0, "--num_workers", 0)
LDM = (*COMMON, "--validation_steps", 0)
STILL = ("--learning_rate", 0)
PROMPTS = {"AD": "a brain with disease", "NC": "a healthy brain"}
GIVEN = [f"{name}={text}" for name, text in PROMPTS.items()]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_stable_diffusion(tmp_path_factory.mktemp("hub") / "tiny-sd")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """Stable Diffusion 2.1 predicts the velocity."""
    return write_stable_diffusion(tmp_path_factory.mktemp("hub") / "tiny-sd-2", "v_prediction")


@pytest.fixture
def copy(sd, tmp_path):
    return shutil.copytree(sd, tmp_path / "copy")


@pytest.fixture
def run(phantom_dir, tmp_path):
    """Run a recipe in this process by its command line; returns the folder that it writes."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def run(recipe, *words, to="out"):
        AcceleratorState._reset_state(True)
        places = ("--data_dir", phantom_dir, "--output_dir", tmp_path / to)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{recipe.__name__}.py", *map(str, (*words, *places))])
            recipe.main()
        return tmp_path / to

    yield run
    AcceleratorState._reset_state(True)
    for number, handler in kept.items():
        signal.signal(number, handler)


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@torch.no_grad()
def prompt_embeddings(folder, prompts):
    """What Stable Diffusion's U-Net reads, (B, 77, D), and the place of the end of each prompt."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()
    options = {"padding": "max_length", "max_length": PLACES, "truncation": True, "return_tensors": "pt"}
    encoded = tokenizer(list(prompts), **options)
    ends = [ids.index(tokenizer.eos_token_id) for ids in encoded.input_ids.tolist()]
    return encoder(encoded.input_ids)[0], ends


@torch.no_grad()
def class_tokens(pipeline, *classes):
    labels = torch.tensor([pipeline.class_embedding.labels_of(name)[0] for name in classes])
    null = torch.tensor([pipeline.class_embedding.null_label])
    return pipeline.class_embedding(torch.cat([labels, null])).tokens


# ---- What stays --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sd", "sd2"])
def test_without_learning_it_is_the_same_model_of_class_tokens(base, run, request, tmp_path):
    base = request.getfixturevalue(base)
    out = run(train_ldm, "--init_from", base, "--class_prompts", *GIVEN, *LDM, *STILL)
    before, after = load_file(base / UNET), load_file(out / UNET)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    # The pipeline is ours, and loads as always: without the text encoder, in the image size of the data.
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    parts = {"vae", "unet", "class_embedding", "scheduler"}
    given = {name for name, part in pipeline.components.items() if part is not None}
    assert given == parts and pipeline.unet.config.sample_size == 8
    assert {path.name for path in out.iterdir() if path.is_dir()} == parts
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["AD", "NC"], 2, output_type="pt").images.shape == (2, 1, 16, 16)

    # Class tokens: the last word and the end of the prompt; the null class has the empty prompt.
    embeddings, ends = prompt_embeddings(base, [*PROMPTS.values(), ""])
    expected = torch.stack([row[end - 1 : end + 1] for row, end in zip(embeddings, ends)])
    assert torch.allclose(class_tokens(pipeline, "AD", "NC"), expected, atol=1e-6)
    assert ends[2] == 1, "the null class: beginning and end"


def test_the_noise_schedule_is_that_of_the_base(sd, sd2, run):
    for base, kind in ((sd, "epsilon"), (sd2, "v_prediction")):
        config = load_pipeline(
            str(run(train_ldm, "--init_from", base, *LDM, *STILL, to=kind))
        ).scheduler.config
        assert config.prediction_type == kind and not config.rescale_betas_zero_snr
        assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", 0.00085, 0.012)
        assert not config.set_alpha_to_one and config.steps_offset == 1 and not config.clip_sample


def test_defaults_that_a_schedulers_config_omits_are_those_of_its_class(copy, run):
    """Euler's betas are DDIM's; LCM's are not, and a config of its own may leave them out."""
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))
    edit(copy / "model_index.json", scheduler=["diffusers", "LCMScheduler"])
    scheduler = load_base(str(copy), ("AD", "NC")).scheduler
    assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.beta_end == 0.012
    EulerDiscreteScheduler(beta_schedule="linear").save_pretrained(copy / "scheduler")
    edit(copy / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    assert load_base(str(copy), ("AD", "NC")).scheduler.config.beta_schedule == "linear"


def test_the_autoencoder_is_folded_and_its_latents_keep_their_scale(sd, run):
    colour = AutoencoderKL.from_pretrained(sd / "vae").eval()
    pipeline = load_pipeline(str(run(train_ldm, "--init_from", sd, *LDM, *STILL)))
    grey = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = colour.encode(grey.expand(-1, 3, -1, -1)).latent_dist.mean * colour.config.scaling_factor
        found = normalize_latents(pipeline.vae, pipeline.vae.encode(grey).latent_dist.mean)
    assert torch.allclose(found, expected, atol=1e-5)

    measured = load_pipeline(str(run(train_ldm, "--init_from", sd, "--measure_latents", *LDM, to="measured")))
    statistics = [measured.vae.config[name] for name in ("latents_mean", "latents_std")]
    assert all(abs(mean) > 1e-3 for mean in statistics[0]) and max(statistics[1]) < 2, "5.49 is the SD's own"


@pytest.mark.parametrize("base", ["sd", "sd2"])
def test_with_all_places_it_predicts_what_stable_diffusion_predicts_for_the_prompt(base, run, request):
    base = request.getfixturevalue(base)
    words = ("--init_from", base, "--class_prompts", *GIVEN, "--tokens_per_class", PLACES)
    pipeline = load_pipeline(str(run(train_ldm, *words, *LDM, *STILL)))
    unet = UNet2DConditionModel.from_pretrained(base / "unet").eval()
    embeddings = prompt_embeddings(base, [*PROMPTS.values(), ""])[0]
    assert torch.allclose(class_tokens(pipeline, "AD", "NC"), embeddings, atol=1e-6)
    noisy, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 999])
    tokens = pipeline.class_embedding(torch.tensor([0, 1, 2])).tokens
    with torch.no_grad():
        expected = unet(noisy, timesteps, embeddings).sample
        assert torch.allclose(pipeline.unet(noisy, timesteps, tokens).sample, expected, atol=1e-5)


# ---- What changes ------------------------------------------------------------------------------------------


def test_another_objective_counts_and_its_cost_is_noted(sd, run, capsys):
    words = ("--init_from", sd, *LDM, *STILL, "--prediction_type", "v_prediction")
    words += ("--rescale_betas_zero_snr", "true")
    config = load_pipeline(str(run(train_ldm, *words))).scheduler.config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing", "the last timestep is sampled from"
    assert "--prediction_type v_prediction, --rescale_betas_zero_snr True is new" in capsys.readouterr().out
    with pytest.raises(UserError, match="epsilon cannot be learned at zero terminal SNR"):
        run(train_ldm, "--init_from", sd, *LDM, "--rescale_betas_zero_snr", "true", to="refused")


def test_a_lora_lies_over_the_base(sd, run):
    """Of any number of class tokens, those of the base included."""
    words = ("--init_from", sd, *LDM, "--learning_rate", 1e-2, "--max_steps", 3, "--lora_rank", 2)
    out = run(train_ldm, *words, "--tokens_per_class", 3, "--use_ema", False)
    tuned, base = load_pipeline(str(out)), load_base(str(sd), ("AD", "NC"))
    base.unet.register_to_config(sample_size=8)

    def sample(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(["AD", "NC"], 2, generator=torch.Generator().manual_seed(0), output_type="pt").images

    without = sample(base)
    base.load_lora_weights(out)
    assert torch.allclose(sample(base), sample(tuned), atol=1e-5)
    assert (without - sample(tuned)).abs().max() > 1e-3


def test_a_decoder_is_trained_first_and_the_ldm_on_it(sd, run):
    """The better way: the latents stay what the U-Net knows."""
    vae = run(train_vae, "--init_from", sd, "--decoder_only", *COMMON, "--learning_rate", 1e-3, to="vae")
    before, after = load_autoencoder(str(sd)), load_autoencoder(str(vae))
    assert after.config.latents_mean == [0.0] * 4
    assert after.config.latents_std == pytest.approx([1 / 0.18215] * 4)
    assert all(map(torch.equal, before.encoder.parameters(), after.encoder.parameters()))
    assert not all(map(torch.equal, before.decoder.parameters(), after.decoder.parameters()))
    pipeline = load_pipeline(str(run(train_ldm, "--init_from", sd, "--vae", vae, *LDM, *STILL)))
    assert pipeline.vae.config.latents_std == after.config.latents_std
    assert all(map(torch.equal, pipeline.vae.parameters(), after.parameters()))


def test_the_result_is_fine_tuned_further_with_its_own_tokens(sd, run):
    words = ("--init_from", sd, "--class_prompts", *GIVEN, "--tokens_per_class", 4, *LDM, *STILL)
    first = run(train_ldm, *words)
    second = run(train_ldm, "--init_from", first, *LDM, *STILL, to="second")
    tokens = [class_tokens(load_pipeline(str(folder)), "AD", "NC") for folder in (first, second)]
    assert torch.equal(*tokens)
    unet = load_pipeline(str(second)).unet
    assert unet.config["_base_model"] == {"name": "tiny-sd", "license": "creativeml-openrail-m"}


# ---- Where it is -------------------------------------------------------------------------------------------


def test_without_a_text_encoder_the_tokens_are_random_of_unit_variance(copy):
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(copy / name)
    edit(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    tokens = class_tokens(load_base(str(copy), ("AD", "NC"), tokens_per_class=PLACES), "AD", "NC")
    assert tokens.shape == (3, PLACES, 16) and tokens.std() == pytest.approx(1, abs=0.05)


def test_the_fp16_variant_is_loaded_in_float32(copy):
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = copy / part / f"{name}.safetensors"
        half = {key: value.half() for key, value in load_file(weights).items()}
        save_file(half, copy / part / f"{name}.fp16.safetensors", {"format": "pt"})
        weights.unlink()
    with pytest.raises(UserError, match="copy: not a pipeline"):
        load_base(str(copy), ("AD", "NC"))
    pipeline = load_base(str(copy), ("AD", "NC"), variant="fp16")
    for part in (pipeline.unet, pipeline.vae, pipeline.class_embedding):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


# ---- What does not fit -------------------------------------------------------------------------------------


OTHERS = {
    "StableDiffusionXLPipeline": {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
    "StableDiffusion3Pipeline": {"transformer": ["diffusers", "SD3Transformer2DModel"]},
    "FluxPipeline": {"transformer": ["diffusers", "FluxTransformer2DModel"]},
    "StableDiffusionInpaintPipeline": {},
    "AltDiffusionPipeline has RobertaSeries as its text_encoder": {"text_encoder": ["alt", "RobertaSeries"]},
    "has AsymmetricAutoencoderKL as its vae": {"vae": ["diffusers", "AsymmetricAutoencoderKL"]},
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_pipelines_are_refused_by_name(message, copy):
    name = {"_class_name": message.split()[0]} if "Pipeline" in message else {}
    edit(copy / "model_index.json", **name, **OTHERS[message])
    with pytest.raises(
        UserError, match=f"{message}.*; what fits is .* Stable Diffusion 1.x or 2.x"
    ) as refusal:
        load_base(str(copy), ("AD", "NC"))
    assert "\n" not in str(refusal.value)


def test_a_module_that_the_index_names_is_not_imported(copy):
    edit(copy / "model_index.json", scheduler=["evil", "os"])
    with pytest.raises(UserError, match="is not among the classes that are loaded"):
        load_base(str(copy), ("AD", "NC"))


def test_other_unets_and_schedules_are_refused(copy, tmp_path):
    inpainting = write_stable_diffusion(tmp_path / "inpainting", in_channels=9)
    with pytest.raises(UserError, match="inpainting: an inpainting U-Net of 9 channels.*what fits is"):
        load_base(str(inpainting), ("AD", "NC"))
    edit(copy / "scheduler/scheduler_config.json", prediction_type="sample")
    with pytest.raises(UserError, match="PNDMScheduler, of prediction type sample.*what fits is"):
        load_base(str(copy), ("AD", "NC"))
    edit(copy / "scheduler/scheduler_config.json", prediction_type="epsilon")
    edit(copy / "unet/config.json", num_class_embeds=1000)
    with pytest.raises(UserError, match="further inputs .num_class_embeds=1000"):
        load_base(str(copy), ("AD", "NC"))
    for name, options, message in (
        ("variance", {"out_channels": 8}, "predicts 8 channels of 4"),
        ("consistency", {"time_cond_proj_dim": 16}, "further inputs .time_cond_proj_dim=16"),
    ):
        with pytest.raises(UserError, match=message):
            load_base(str(write_stable_diffusion(tmp_path / name, **options)), ("AD", "NC"))


def test_a_card_that_cannot_be_read_does_not_prevent_loading(copy):
    (copy / "README.md").write_text("---\ntitle: Brains: a model\n---\n")
    assert load_base(str(copy), ("AD", "NC")).unet.config["_base_model"]["license"] == "not stated"


def test_what_the_file_of_a_lora_cannot_hold_is_refused(sd, run):
    words = ("--init_from", sd, *LDM, *STILL, "--lora_rank", 2)
    with pytest.raises(
        UserError, match="--prediction_type v_prediction: a LoRA keeps the schedule of its base"
    ):
        run(train_ldm, *words, "--prediction_type", "v_prediction")
    with pytest.raises(UserError, match="unet.conv_in.weight would be trained, and the LoRA has no place"):
        run(train_ldm, *words, "--freeze", "!unet.conv_in.*")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--init_from", "sd", "--class_prompts", "MCI=a brain"), "--class_prompts 'MCI=a brain': .* AD, NC"),
        (("--init_from", "sd", "--class_prompts", "AD"), "expected CLASS=PROMPT"),
        (("--init_from", "sd", "--class_prompts", "AD=a", "NC=b", "AD=c"), "AD has two prompts"),
        (("--class_prompts", "AD=a brain"), "no text encoder without --init_from"),
        (("--tokens_per_class", "0"), "--tokens_per_class 0"),
    ],
)
def test_prompts_are_of_the_classes(words, message):
    with pytest.raises(UserError, match=message):
        parse_config(TrainLDMConfig, "", list(words))


def test_the_prompts_of_the_class_tokens_are_told_and_need_a_text_encoder(sd, copy, run):
    told = []
    load_base(str(sd), ("AD", "MCI"), {"MCI": "a brain"}, note=told.append)
    (told,) = told
    assert "AD=\"an MRI scan of the brain of a patient with Alzheimer's disease\", MCI='a brain'" in told

    given = {"AD": "a brain"}
    own = run(train_ldm, "--init_from", sd, *LDM, *STILL)
    with pytest.raises(UserError, match="class tokens that were trained, and no text encoder; omit"):
        load_base(str(own), ("AD", "NC"), given)
    edit(copy / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(UserError, match="copy has no text encoder; omit"):
        load_base(str(copy), ("AD", "NC"), given)


def test_latents_of_another_autoencoder_are_not_taken_for_an_inpainting_unet(sd, tmp_path, run):
    """Of 9 channels as well, where the latents have 4."""
    for channels in (3, 8):
        vae = AutoencoderKL(block_out_channels=(32,), latent_channels=channels, latents_mean=[0.0] * channels)
        vae.save_pretrained(tmp_path / str(channels))
        with pytest.raises(
            UserError, match=f"--vae: its latents have {channels} channels and the U-Net .* takes 4"
        ):
            run(train_ldm, "--init_from", sd, "--vae", tmp_path / str(channels), *LDM, *STILL)


def test_more_steps_than_the_schedule_has_after_its_offset_are_refused(sd):
    """Stable Diffusion's timesteps begin one later than DDIM's, so that of 1,000 the first is the 1,001st."""
    pipeline = load_base(str(sd), ("AD", "NC"))
    with pytest.raises(ValueError, match="num_inference_steps=1000 starts after the last timestep"):
        pipeline("AD", num_inference_steps=1000)


def test_prompts_fit_the_text_encoder(sd):
    with pytest.raises(UserError, match="has 82 tokens; at most 77 fit"):
        load_base(str(sd), ("AD", "NC"), {"AD": "brain " * 80})
    with pytest.raises(UserError, match="--tokens_per_class 78: the text encoder has 77"):
        load_base(str(sd), ("AD", "NC"), tokens_per_class=78)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    """By the shape of its first kernel, before anything is downloaded."""
    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 9, 3, 3)}, file)
    for load in (lambda: load_base(str(file), ("AD", "NC")), lambda: load_autoencoder(str(file))):
        with pytest.raises(
            UserError, match="model.safetensors: a checkpoint of the kind inpainting does not"
        ):
            load()


def test_the_autoencoder_that_another_replaces_is_not_loaded(sd, copy):
    (copy / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="copy: not an autoencoder"):
        load_base(str(copy), ("AD", "NC"))
    assert load_base(str(copy), ("AD", "NC"), vae=str(sd)).vae.config.latents_mean == [0.0] * 4
