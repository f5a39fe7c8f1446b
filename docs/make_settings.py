"""Write docs/settings/: a page for each command, from its docstring and the dataclasses of adni_ldm/config/.

    make docs

tests/test_docs.py compares the pages with the output of this script: run it after changing a setting.
"""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from adni_ldm import config

ROOT = Path(__file__).parents[1]
SOURCES = {  # page: (file whose docstring introduces it, {command: its settings})
    "prepare_data": (
        "prepare_data.py",
        {
            "prepare_data.py phantom": config.PhantomConfig,
            "prepare_data.py scans": config.ScansConfig,
            "prepare_data.py check": config.CheckConfig,
            "prepare_data.py forget": config.ForgetConfig,
        },
    ),
    "train_vae": ("train_vae.py", {"train_vae.py": config.TrainVAEConfig}),
    "train_ldm": ("train_ldm.py", {"train_ldm.py": config.TrainLDMConfig}),
    "sample": ("sample.py", {"sample.py": config.SampleConfig}),
    "evaluate": ("evaluate.py", {"evaluate.py": config.EvaluateConfig}),
    "app": ("app.py", {"app.py": config.AppConfig}),
    "hub": (
        "adni_ldm/hub/__main__.py",
        {
            "python -m adni_ldm.hub push": config.PushConfig,
            "python -m adni_ldm.hub push-samples": config.PushSamplesConfig,
        },
    ),
}
INDEX = """# Settings

Each setting is a flag and a key of the YAML file that `--config` names. Flags take precedence over the YAML
file, and the YAML file over the defaults. Values of a list are separated by spaces (`--widths 16 32 64`); a
switch is given alone, or with `true` or `false`. Both training recipes save the resolved settings as
`training_config.json`."""
MADE = "*Generated from the code by `make docs`: edit `adni_ldm/config/`, not this page.*"


def pages() -> dict[str, str]:
    """Return {file name: text} of every page."""
    made = {f"{name}.md": page(*source) for name, source in SOURCES.items()}
    lines = [
        f"- [{name}]({name}.md): {docstring(file).splitlines()[0]}" for name, (file, _) in SOURCES.items()
    ]
    return {"README.md": "\n\n".join([INDEX, "\n".join(lines), MADE]) + "\n"} | made


def page(file: str, commands: dict[str, type]) -> str:
    """Return the docstring of `file` and a table of settings for each command."""
    first = next(iter(commands))
    parts = ["# " + (first.rpartition(" ")[0] or first), docstring(file), MADE]
    for command, settings in commands.items():
        if len(commands) > 1:
            parts.append(f"## {command}")
        rows = [table_row(entry) for entry in dataclasses.fields(settings)]
        parts.append("\n".join(["| setting | default | description |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def table_row(entry: dataclasses.Field) -> str:
    names = [f"--{entry.name}", *entry.metadata.get("aliases", ())]
    default = entry.default
    if default is dataclasses.MISSING:
        default = " ".join(map(str, entry.default_factory()))
    if isinstance(default, bool):
        shown = "on" if default else "off"
    else:
        shown = "" if default in (None, "") else f"`{default}`"
    text = entry.metadata["help"].replace("%%", "%")
    if choices := entry.metadata.get("choices"):
        text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    cells = [", ".join(f"`{name}`" for name in names), shown, text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def docstring(file: str) -> str:
    """Read the docstring of a module without importing it; its indented commands are code in Markdown."""
    return ast.get_docstring(ast.parse((ROOT / file).read_text()))


if __name__ == "__main__":
    folder = Path(__file__).with_name("settings")
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)
    print(f"{len(pages())} pages in {folder}")
