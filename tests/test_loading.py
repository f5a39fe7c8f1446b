"""Loading of models of unknown origin: known classes and safetensors only."""

import json
import shutil
import sys

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file

from adni_ldm.errors import UserError
from adni_ldm.loading import load_autoencoder, load_pipeline
from adni_ldm.models import build_autoencoder
from adni_ldm.models.components import check_model_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def test_pickled_weights_are_refused(tmp_path):
    build_autoencoder(16, widths=(16, 32)).save_pretrained(tmp_path)
    load_autoencoder(str(tmp_path))
    weights = tmp_path / WEIGHTS
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="not an autoencoder .*safetensors"):
        load_autoencoder(str(tmp_path))


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A folder on the path with a module that leaves a mark when it is imported; returns the mark's path."""
    (tmp_path / "runs/evil").mkdir(parents=True)
    mark = tmp_path / "was_run"
    (tmp_path / "runs/evil/evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("runs", "runs.evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return mark


@pytest.mark.parametrize(
    ("component", "named"),
    [
        ("scheduler", ["runs.evil.evil", "Evil"]),
        ("unet", ["runs.evil.evil", "Evil"]),
        ("another", ["runs.evil.evil", "Evil"]),
        ("unet", ["adni_ldm.loading", "Path"]),  # has been imported, which newer diffusers asks for
        ("unet", ["diffusers", "DiffusionPipeline"]),  # reads a model_index.json of its own
        ("unet", ["diffusers", "FlashPackUNet2DConditionModel"]),
        ("scheduler", ["diffusers", "FlaxScheduler"]),
        ("scheduler", ["transformers", "AutoModel"]),
        ("scheduler", ["diffusers", "DDIMScheduler", "more"]),
        ("scheduler", [["diffusers"], "DDIMScheduler"]),
        ("../scheduler", ["diffusers", "DDIMScheduler"]),
    ],
)
@pytest.mark.parametrize("own", [["pipeline", "ClassConditionalLDMPipeline"], "DiffusionPipeline"])
def test_a_class_that_is_not_a_models_is_refused_by_name(pipeline, evil, tmp_path, component, named, own):
    folder = tmp_path / "model"
    pipeline.save_pretrained(folder)
    for part in ("unet", "scheduler", "another"):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "evil.py").write_text(f"open({str(evil)!r}, 'w')\nclass Evil: pass\n")
    edit(folder / "model_index.json", _class_name=own, **{component: named})
    name = named[0] if isinstance(named[0], str) else named[0][0]
    with pytest.raises(UserError, match=rf"{component}.*{name}.*not among the classes"):
        load_pipeline(str(folder))
    assert not evil.exists()


def test_a_text_to_image_model_is_admitted_without_its_safety_checker(tmp_path):
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    }
    components = {
        "scheduler": ("diffusers", "PNDMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    edit(tmp_path / "model_index.json", **index, **components)
    assert check_model_folder(tmp_path) == components


def test_our_pipeline_loads_beside_a_safety_checker(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    loaded = load_pipeline(str(tmp_path)).components
    assert {name for name, part in loaded.items() if part} == {"vae", "unet", "class_embedding", "scheduler"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"quantization_config": {"quant_method": "torchao"}}, "quantized"),
        ("adapter_config.json", {"base_model_name_or_path": "someone/else"}, "adapters"),
        (
            f"{WEIGHTS}.index.json",
            {"weight_map": {"a": "weights.bin"}},
            "'weights.bin' is not a .safetensors",
        ),
        (f"{WEIGHTS}.index.json", {"weight_map": {"a": "../x.safetensors"}}, "'../x.safetensors' is not a"),
        (f"{WEIGHTS}.index.json", {"weight_map": None}, "'None' is not"),
    ],
)
def test_weights_from_elsewhere_are_refused(pipeline, tmp_path, file, content, message):
    pipeline.save_pretrained(tmp_path / "whole")
    for folder, load in (("vae", load_autoencoder), ("unet", load_pipeline)):
        model = shutil.copytree(tmp_path / "whole", tmp_path / folder)
        edit(model / folder / file, **content)
        with pytest.raises(UserError, match=rf"{folder}/{file}: .*{message}"):
            load(str(model))


def test_an_autoencoder_of_another_class_is_refused_by_name(tmp_path):
    AutoencoderTiny().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'AutoencoderTiny' is not AutoencoderKL"):
        load_autoencoder(str(tmp_path))
    AutoencoderKL().save_pretrained(tmp_path)
    assert load_autoencoder(str(tmp_path)).config.in_channels == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"[1]", b"{"])
def test_an_index_that_is_no_json_object_is_one_line(pipeline, tmp_path, content):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_bytes(content)
    with pytest.raises(UserError, match="model_index.json: (not JSON|a JSON object)"):
        load_pipeline(str(tmp_path))


def test_a_pickled_lora_is_refused(pipeline, tmp_path):
    weights = {"class_embedding.table.weight": pipeline.class_embedding.table.weight}
    torch.save(weights, tmp_path / "pytorch_lora_weights.bin")
    for source, options in (
        (tmp_path, {"weight_name": "pytorch_lora_weights.bin"}),
        (tmp_path / "pytorch_lora_weights.bin", {}),
    ):
        with pytest.raises(
            ValueError, match=r"pytorch_lora_weights.bin: a LoRA is loaded from a .safetensors"
        ):
            pipeline.load_lora_weights(source, **options)
