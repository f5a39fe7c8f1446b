"""README.md and docs/: settings match the code, flags exist, and links have targets."""

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from adni_ldm import config

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CHANGELOG = ROOT / "CHANGELOG.md"
COMMANDS = {
    "train_vae.py": config.TrainVAEConfig,
    "train_ldm.py": config.TrainLDMConfig,
    "sample.py": config.SampleConfig,
    "evaluate.py": config.EvaluateConfig,
    "app.py": config.AppConfig,
    "prepare_data.py phantom": config.PhantomConfig,
    "prepare_data.py scans": config.ScansConfig,
    "prepare_data.py check": config.CheckConfig,
    "prepare_data.py forget": config.ForgetConfig,
    "adni_ldm.hub push": config.PushConfig,
    "adni_ldm.hub push-samples": config.PushSamplesConfig,
}
OTHERS = {"--config", "--help", "--max_restarts"}  # of every recipe, and of accelerate


def flags(settings):
    """All flags of a command."""
    entries = dataclasses.fields(settings)
    return {f"--{entry.name}" for entry in entries}.union(
        *(entry.metadata.get("aliases", ()) for entry in entries)
    )


def command_lines(text):
    """Lines of the bash blocks, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()


def test_settings_pages_match_the_code():
    path = ROOT / "docs/make_settings.py"
    spec = importlib.util.spec_from_file_location("make_settings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = {path.name: path.read_text() for path in (ROOT / "docs/settings").iterdir()}
    assert written == module.pages(), "run `make docs` and commit docs/settings"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_shown_with_flags_that_they_have(page):
    for line in command_lines(page.read_text()):
        words = shlex.split(line, comments=True)
        scripts = [word for word in words if word.endswith(".py") or word == "adni_ldm.hub"]
        if not scripts:
            continue
        place = words.index(scripts[-1])
        shown = {word for word in words[place:] if word.startswith("--")} - {"--config", "--help"}
        if scripts[-1].startswith(("benchmarks/", "tests/", "docs/", "examples/")):
            source = (ROOT / scripts[-1]).read_text()
            assert all(flag in source for flag in shown), line
        else:
            name = scripts[-1] if scripts[-1] in COMMANDS else " ".join(words[place : place + 2])
            assert shown <= flags(COMMANDS[name]), line
        for word in words:
            if word.startswith(("configs/", "accelerate_config")):
                assert (ROOT / word).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_in_the_text_exist(page):
    if page == CHANGELOG:
        pytest.skip("it lists flags that were renamed or removed")
    known = OTHERS.union(*map(flags, COMMANDS.values()))
    benchmarks = {
        flag for path in ROOT.glob("benchmarks/*.py") for flag in re.findall(r"--\w+", path.read_text())
    }
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    ours = [span for span in re.findall(r"`([^`\n]+)`", prose) if "--config_file" not in span]
    assert not {flag for span in ours for flag in re.findall(r"--[a-z]\w*", span)} - known - benchmarks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_have_targets(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
