"""Features are those of the named network, independent of the batch, with the hash of its weights."""

import json
import sys

import numpy as np
import pytest
import torch
from discs import discs
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from adni_ldm.errors import UserError
from adni_ldm.evaluation.classifier import build_classifier, probabilities
from adni_ldm.evaluation.features import load_extractor
from adni_ldm.models import build_autoencoder

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def test_the_classifiers_features_are_the_input_of_its_last_layer():
    model, images = build_classifier(2, 32).eval(), discs(5)
    extract = load_extractor("classifier", classifier=model)
    features = extract(images, batch_size=4)
    assert features.shape == (10, 256) and features.dtype == np.float32
    logits = model.fc(torch.from_numpy(features))
    assert np.allclose(logits.softmax(1).detach(), probabilities(model, images), atol=1e-5)
    assert np.allclose(features, extract(images), atol=1e-5), "independent of the batch"

    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] += 1e-3
    assert load_extractor("classifier", classifier=model).hash != extract.hash


def test_the_vaes_features_are_its_normalized_latents_pooled():
    vae, images = build_autoencoder(32, widths=(16, 32)).eval(), discs(3)
    vae.register_to_config(latents_mean=[1.0, 0, 0, 0], latents_std=[2.0, 1, 1, 1])
    features = load_extractor("vae", vae=vae)(images)
    with torch.no_grad():
        latents = vae.encode(images.floats()).latent_dist.mean  # (6, 4, 16, 16)
    first = (latents[:, 0, :2, :2].mean((1, 2)) - 1) / 2
    assert features.shape == (6, 4 * 8 * 8)
    assert np.allclose(features[:, 0], first, atol=1e-5)


def save_vision_model(kind, folder):
    torch.manual_seed(0)
    if kind == "dinov2":
        Dinov2Model(Dinov2Config(**TINY, image_size=28, patch_size=14)).save_pretrained(folder)
        BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(
            folder
        )
    else:
        config = ViTConfig(**TINY, image_size=32, patch_size=8)
        ViTModel(config, add_pooling_layer=kind == "vit").save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["vit", "vit without pooler", "dinov2"])
def test_a_vision_models_folder_gives_features(kind, tmp_path):
    save_vision_model(kind, tmp_path)
    images = discs(3)
    extract = load_extractor(str(tmp_path))
    features = extract(images, batch_size=4)
    assert features.shape == (6, 16) and np.isfinite(features).all()
    assert len(np.unique(features.round(4), axis=0)) == 6, "they depend on the slice"

    torch.manual_seed(1)  # no weight is initialized at random when loading
    again = load_extractor(str(tmp_path))
    assert again.hash == extract.hash
    assert np.allclose(again(images), features, atol=1e-5)


def test_a_vision_models_folder_runs_no_code_and_names_no_other_weights(tmp_path):
    save_vision_model("vit", tmp_path)
    path, mark = tmp_path / "config.json", tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))
    load_extractor(str(tmp_path))
    assert not mark.exists()

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(UserError, match="elsewhere.bin' is not a .safetensors file of this folder"):
        load_extractor(str(tmp_path))
    index.unlink()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "other/model"}')
    with pytest.raises(UserError, match="adapters are not loaded"):
        load_extractor(str(tmp_path))


def test_unusable_feature_networks_are_rejected_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    BertModel(BertConfig(**TINY, vocab_size=8)).save_pretrained(tmp_path / "bert")
    ViTImageProcessor().save_pretrained(tmp_path / "bert")
    save_vision_model("vit", tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    kept = {
        key: value for key, value in load_file(weights).items() if "query" not in key and "q_proj" not in key
    }
    save_file(kept, weights, metadata={"format": "pt"})
    save_vision_model("vit", tmp_path / "pickled")
    pickled = tmp_path / "pickled" / weights.name
    torch.save(load_file(pickled), pickled.with_name("pytorch_model.bin"))
    pickled.unlink()
    refusals = {
        "inception": "pip install torch-fidelity, or choose classifier",
        "vae": "give --model",
        "classifier": "two classes",
        "no-such-model": "not classifier, vae, inception or a vision model",
        str(tmp_path / "bert"): "reads input_ids, not images",
        str(tmp_path / "broken"): "would be random",
        str(tmp_path / "pickled"): "no file named model.safetensors",
    }
    for name, message in refusals.items():
        with pytest.raises(UserError, match=message) as error:
            load_extractor(name)
        assert "\n" not in str(error.value)
