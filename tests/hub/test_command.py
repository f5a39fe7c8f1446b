"""python -m adni_ldm.hub: its commands and their arguments."""

import runpy
import sys

import pytest


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["push", "--repo_id", "me/brains"], 1, "runs/ldm"),  # the default folder
        (["push", "my/ldm", "--repo_id", "me/brains"], 1, "my/ldm"),
        (["push-samples", "--repo_id", "me/brains"], 1, "samples: contains no metadata.csv"),
        (["pull"], 1, "no command 'pull', only push, push-samples"),
        ([], 0, "python -m adni_ldm.hub push runs/ldm"),
    ],
)
def test_commands(arguments, status, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adni_ldm.hub", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("adni_ldm.hub", run_name="__main__")
    printed = capsys.readouterr()
    assert (exit_.value.code or 0) == status and message in printed.out + printed.err
