"""Loading of models of unknown origin: safetensors only."""

import pytest
import torch
from safetensors.torch import load_file

from adni_ldm.errors import UserError
from adni_ldm.loading import load_autoencoder
from adni_ldm.models import build_autoencoder


def test_pickled_weights_are_refused(tmp_path):
    build_autoencoder(16, widths=(16, 32)).save_pretrained(tmp_path)
    load_autoencoder(str(tmp_path))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(UserError, match="not an autoencoder .*safetensors"):
        load_autoencoder(str(tmp_path))
