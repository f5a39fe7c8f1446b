"""Settings: flags take precedence over the YAML file, and errors name the setting."""

import json
from dataclasses import is_dataclass

import pytest

from adni_ldm import config
from adni_ldm.config import SampleConfig, TrainLDMConfig, TrainVAEConfig, parse_config, save_config
from adni_ldm.errors import UserError


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("max_steps: 30\nlearning_rate: 2e-3\nwidths: [16, 32]\nmixed_precision: bf16\n")
    return str(path)


def test_flags_stand_over_the_yaml_and_the_yaml_over_the_defaults(preset):
    cfg = parse_config(TrainVAEConfig, "", ["--config", preset, "--max_steps", "7", "--use_ema"])
    assert (cfg.max_steps, cfg.learning_rate, cfg.widths, cfg.mixed_precision) == (7, 2e-3, [16, 32], "bf16")
    assert cfg.use_ema and cfg.batch_size == TrainVAEConfig.batch_size
    assert parse_config(TrainVAEConfig, "", ["--widths", "8", "16"]).widths == [8, 16]


def test_the_class_goes_by_its_short_flag():
    assert parse_config(SampleConfig, "", ["--class", "AD"]).class_labels == "AD"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_stepz: 3", "max_stepz is no setting"),
        ("mixed_precision: fp8", "fp8 is none of no, fp16, bf16"),
        ("- 3", "setting: value"),
        ("max_steps: 1.5", "max_steps: 1.5 is no value"),
        ("max_steps: [3]", "max_steps: .3. is no value"),
        ("widths: 16", "widths: 16 is no value"),
        ("widths: [a]", "widths: .'a'. is no value"),
        ("learning_rate: 2e-", "learning_rate: 2e- is no value"),
        ("use_ema: {a: 1}", "use_ema: .* is no value"),
        ("3: 4", "3 is no setting"),
        ("a: [", "not YAML"),
        ("a: \0", "not YAML"),
    ],
)
def test_a_yaml_that_is_wrong_is_refused_by_name(line, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(line)
    with pytest.raises(UserError, match=message) as refusal:
        parse_config(TrainVAEConfig, "", ["--config", str(path)])
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--max_steps", "0"],
        ["--val_fraction", "1"],
        ["--label_dropout", "1"],
        ["--num_inference_steps", "0"],
        ["--eta", "1.5"],
        ["--prediction_type", "epsilon"],
    ],
)
def test_values_out_of_range_are_refused_by_their_flag(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        parse_config(TrainLDMConfig, "", arguments)


def test_every_preset_is_read_and_every_setting_has_help():
    for preset, config_class in (("vae", TrainVAEConfig), ("ldm", TrainLDMConfig)):
        for kind in ("demo", "adni"):
            parse_config(config_class, "", ["--config", f"configs/{kind}/{preset}.yaml"])
        assert all(len(entry.metadata["help"]) > 15 for entry in config_class.__dataclass_fields__.values())


@pytest.mark.parametrize("name", [name for name, kind in vars(config).items() if is_dataclass(kind)])
def test_help_names_every_setting(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse_config(getattr(config, name), "", ["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{entry}" in shown for entry in getattr(config, name).__dataclass_fields__)


def test_what_a_run_was_started_with_can_start_it_again(preset, tmp_path):
    cfg = parse_config(TrainVAEConfig, "", ["--config", preset])
    save_config(cfg, tmp_path / "run")
    saved = tmp_path / "run/training_config.json"
    assert json.loads(saved.read_text())["widths"] == [16, 32]
    assert parse_config(TrainVAEConfig, "", ["--config", str(saved)]) == cfg, "JSON is YAML"


@pytest.mark.parametrize("config", [TrainVAEConfig, TrainLDMConfig])
def test_a_tracker_that_may_send_to_a_server_is_asked_for(config):
    for tracker in ("wandb", "mlflow", "all"):
        with pytest.raises(UserError, match=f"--report_to {tracker} may send.*Add --allow_remote_tracker"):
            config(report_to=tracker)
        assert config(report_to=tracker, allow_remote_tracker=True).report_to == tracker
    assert config().report_to == "tensorboard" and config(report_to="none").report_to == "none"
