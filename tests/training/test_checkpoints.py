"""Checkpoints: whole or not there, and never those of another run."""

import pytest
import torch
from accelerate import Accelerator

from adni_ldm.errors import UserError
from adni_ldm.training.checkpoints import load_checkpoint, refuse_earlier_run, save_checkpoint


@pytest.fixture
def prepared():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    yield accelerator, model, optimizer
    accelerator.free_memory()


def update(accelerator, model, optimizer):
    accelerator.backward(model(torch.ones(4, 2)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def test_weights_and_optimizer_come_back(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    update(*prepared)
    save_checkpoint(accelerator, tmp_path, step=1, keep=2)
    update(*prepared)
    after = model.weight.detach().clone()
    assert load_checkpoint(accelerator, tmp_path, "latest") == 1
    update(*prepared)
    assert torch.equal(model.weight, after), "the optimizer's moments came back as well"


def test_the_newest_are_kept_and_a_half_written_one_is_passed_over(prepared, tmp_path):
    accelerator, *_ = prepared
    for step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path, step, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    (folder / "step-00000003").rename(folder / "step-00000009.partial")  # as a kill while writing leaves it
    assert load_checkpoint(accelerator, tmp_path, "latest") == 2


def test_where_there_is_nothing_to_resume(prepared, tmp_path):
    accelerator, *_ = prepared
    assert load_checkpoint(accelerator, tmp_path, "latest") == 0
    assert load_checkpoint(accelerator, tmp_path, None) == 0
    with pytest.raises(UserError, match="no checkpoint there"):
        load_checkpoint(accelerator, tmp_path, str(tmp_path))


def test_a_fresh_start_over_an_earlier_run_is_refused(prepared, tmp_path):
    accelerator, *_ = prepared
    refuse_earlier_run(tmp_path, None)
    save_checkpoint(accelerator, tmp_path, 5, keep=1)
    refuse_earlier_run(tmp_path, "latest")
    with pytest.raises(UserError, match="step-00000005 is of an earlier run"):
        refuse_earlier_run(tmp_path, None)
