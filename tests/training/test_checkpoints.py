"""Checkpoints: whole or not there, verified, and never those of another run."""

import contextlib
import json
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from adni_ldm import files
from adni_ldm.config import TrainLDMConfig, settings_to_keep
from adni_ldm.errors import UserError
from adni_ldm.training.checkpoints import check_earlier_run, load_checkpoint, save_checkpoint
from adni_ldm.training.ema import HalfLifeEMA, update_ema


@pytest.fixture
def prepared():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    yield accelerator, model, optimizer
    accelerator.free_memory()
    AcceleratorState._reset_state(True)


def update(accelerator, model, optimizer):
    accelerator.backward(model(torch.ones(4, 2)).square().mean())
    optimizer.step()
    optimizer.zero_grad()


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_weights_optimizer_average_and_counts_come_back(prepared, tmp_path):
    accelerator, model, optimizer = prepared
    ema = HalfLifeEMA(model.parameters(), 1, 8, "cpu")
    update(*prepared)
    update_ema(ema, model.parameters())
    save_checkpoint(accelerator, tmp_path, step=1, keep=2, ema=ema, skipped=3)
    update(*prepared)
    update_ema(ema, model.parameters())
    after, averaged = model.weight.detach().clone(), ema.shadow_params[0].clone()
    assert load_checkpoint(accelerator, tmp_path, "latest", ema=ema) == {"step": 1, "skipped": 3}
    update(*prepared)
    update_ema(ema, model.parameters())
    assert torch.equal(model.weight, after), "the optimizer's moments came back as well"
    assert torch.equal(ema.shadow_params[0], averaged)


def test_the_newest_are_kept_and_a_half_written_one_is_passed_over(prepared, tmp_path):
    accelerator, *_ = prepared
    for step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path, step, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    (folder / "step-00000003").rename(folder / "step-00000009.partial")  # as a kill while writing leaves it
    assert load_checkpoint(accelerator, tmp_path, "latest")["step"] == 2
    save_checkpoint(accelerator, tmp_path, 4, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"]
)
def test_a_damaged_one_is_passed_over_and_named(name, prepared, tmp_path, caplog):
    accelerator, *_ = prepared
    for step in (1, 2):
        save_checkpoint(accelerator, tmp_path, step, keep=2)
    newest = tmp_path / "checkpoints/step-00000002"
    damage(newest / name)
    with pytest.raises(UserError, match=f"step-00000002 is damaged: {name}"):
        load_checkpoint(accelerator, tmp_path, str(newest))
    assert load_checkpoint(accelerator, tmp_path, "latest")["step"] == 1
    assert str(newest) in caplog.text and name in caplog.text
    assert (tmp_path / "checkpoints/step-00000002.damaged").is_dir(), "kept, and never taken for a good one"

    damage(tmp_path / "checkpoints/step-00000001" / name)
    with pytest.raises(UserError, match="no intact checkpoint is left"):
        load_checkpoint(accelerator, tmp_path, "latest")


def test_a_missing_and_a_truncated_file_are_damage(prepared, tmp_path):
    accelerator, *_ = prepared
    for step in (1, 2, 3):
        save_checkpoint(accelerator, tmp_path, step, keep=3)
    (tmp_path / "checkpoints/step-00000003/optimizer.bin").unlink()
    (tmp_path / "checkpoints/step-00000002/model.safetensors").write_bytes(b"1234")
    assert load_checkpoint(accelerator, tmp_path, "latest")["step"] == 1


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl"])
def test_nothing_is_unpickled_but_weights(name, prepared, tmp_path):
    """A checkpoint from elsewhere cannot run code, even with correct checksums."""
    accelerator, *_ = prepared
    flag = tmp_path / "code-ran"

    class Evil:
        def __reduce__(self):
            return (flag.write_text, ("ran",))

    ema = HalfLifeEMA([torch.nn.Parameter(torch.ones(2))], 1, 8, "cpu")
    save_checkpoint(accelerator, tmp_path, 1, keep=1, ema=ema)
    folder = tmp_path / "checkpoints/step-00000001"
    assert load_file(folder / "model.safetensors") and load_file(folder / "ema.safetensors")
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.bin",
        "progress.json",
        "random_states_0.pkl",
    ]
    torch.save({"state": Evil()}, folder / name)
    progress = json.loads((folder / "progress.json").read_text())
    progress.pop("sha256")
    entry = progress["files"][name]
    entry["bytes"] = (folder / name).stat().st_size
    entry["sha256"] = files._sha256(folder / name)
    progress["sha256"] = files._sha256_of(progress)
    (folder / "progress.json").write_text(json.dumps(progress))
    refused = pytest.raises(pickle.UnpicklingError, match="[Ww]eights")
    # accelerate goes on without random states that it cannot read
    with refused if name == "optimizer.bin" else contextlib.nullcontext():
        load_checkpoint(accelerator, tmp_path, "latest", ema=ema)
    assert not flag.exists()


def test_a_full_disk_leaves_the_last_good_one_and_says_so(prepared, tmp_path, monkeypatch):
    accelerator, *_ = prepared
    save_checkpoint(accelerator, tmp_path, 1, keep=1)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    with pytest.raises(UserError, match="No space left on device.*last good checkpoint is step-00000001"):
        save_checkpoint(accelerator, tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def identity(processes=2, data="abc", **settings):
    must = {"number of processes": processes, "data": data}
    kept = settings_to_keep(TrainLDMConfig(**settings))
    return {"must": must | kept["must"], "should": kept["should"]}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"processes": 4}, "number of processes was 2, is 4"),
        ({"data": "xyz"}, "data was abc, is xyz"),
        ({"learning_rate": 0.5}, "--learning_rate was 0.0001, is 0.5"),
        ({"max_steps": 5}, "--max_steps was 10000, is 5"),
        ({"batch_size": 3, "seed": 1}, "--batch_size was 16, is 3; --seed was 0, is 1"),
    ],
)
def test_a_resume_of_another_run_is_refused_by_name(changed, named, prepared, tmp_path):
    accelerator, *_ = prepared
    save_checkpoint(accelerator, tmp_path, 1, keep=1, identity=identity())
    with pytest.raises(UserError, match=named):
        load_checkpoint(accelerator, tmp_path, "latest", identity=identity(**changed))
    assert (tmp_path / "checkpoints/step-00000001").is_dir(), "it is not damaged"


def test_what_does_not_matter_may_change_and_rounding_is_warned_of(prepared, tmp_path, caplog):
    accelerator, *_ = prepared
    save_checkpoint(accelerator, tmp_path, 1, keep=1, identity=identity())
    free = {"log_steps": 1, "report_to": "none", "checkpointing_steps": 3, "output_dir": "elsewhere"}
    free |= {"checkpoints_total_limit": 9, "validation_steps": 7, "num_workers": 3, "data_dir": "moved"}
    load_checkpoint(accelerator, tmp_path, "latest", identity=identity(**free))
    assert not caplog.text
    load_checkpoint(accelerator, tmp_path, "latest", identity=identity(gradient_checkpointing=True))
    assert "--gradient_checkpointing was False, is True" in caplog.text


def test_where_there_is_nothing_to_resume(prepared, tmp_path):
    accelerator, *_ = prepared
    assert load_checkpoint(accelerator, tmp_path, "latest") == {"step": 0}
    assert load_checkpoint(accelerator, tmp_path, None) == {"step": 0}
    with pytest.raises(UserError, match="no checkpoint there"):
        load_checkpoint(accelerator, tmp_path, str(tmp_path))


def test_a_start_over_an_earlier_run_is_refused(prepared, tmp_path):
    accelerator, *_ = prepared
    check_earlier_run(tmp_path, None)
    for step in (3, 5):
        save_checkpoint(accelerator, tmp_path, step, keep=2)
    check_earlier_run(tmp_path, "latest")
    with pytest.raises(UserError, match="step-00000005 is of an earlier run"):
        check_earlier_run(tmp_path, None)
    check_earlier_run(tmp_path, str(tmp_path / "checkpoints/step-00000005"))
    with pytest.raises(UserError, match="step-00000005 is later than"):
        check_earlier_run(tmp_path, str(tmp_path / "checkpoints/step-00000003"))
