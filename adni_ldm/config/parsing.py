"""Parsing of settings: a dataclass from flags and a YAML file, with help."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from adni_ldm.errors import UserError

Config = TypeVar("Config")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows the default of each setting, and keeps the line breaks of the description."""


def parse_config(
    config_class: type[Config],
    description: str,
    arguments: list[str] | None = None,
    prog: str | None = None,
    positional: str | None = None,
) -> Config:
    """Settings from `--config FILE.yaml` and from flags, which override it.

    `positional` is the setting that a first argument without a flag sets. An unknown flag ends with
    argparse's usage message. Raises UserError for a missing file, no mapping or an unknown setting.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if positional and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    parser = HfArgumentParser(
        config_class,
        prog=prog,
        usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="File of settings; flags override it.")
    path = parser.parse_known_args(arguments)[0].config
    if path:
        parser.set_defaults(**_read_yaml(Path(path), parser))
    values = vars(parser.parse_args(arguments))
    values.pop("config")
    return config_class(**values)


def check_at_least(least: float, config, *names: str) -> None:
    """Raise UserError if one of these settings is given and below `least`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value} must be at least {least}")


def check_sampling(config) -> None:
    """Raise UserError if --num_inference_steps or --eta is given and no sampling could use it."""
    check_at_least(1, config, "num_inference_steps")
    if config.eta is not None and not 0 <= config.eta <= 1:
        raise UserError(f"--eta {config.eta} must lie in [0, 1]")


def run_command(description: str, commands: Mapping[str, Callable[[list[str]], int | None]]) -> int | None:
    """Run the command that the first argument names with the remaining arguments; returns its exit status.

    Without a command, and with --help, prints `description`. Raises UserError for an unknown command.
    """
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(description)
        return 0
    if command not in commands:
        raise UserError(f"there is no command {command!r}, only {', '.join(commands)}")
    return commands[command](arguments)


def _read_yaml(path: Path, parser: HfArgumentParser) -> dict:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not YAML ({reason}); see configs/ for examples") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of `setting: value`")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    if unknown := sorted(map(str, set(values) - set(known))):
        raise UserError(f"{path}: {', '.join(unknown)} is no setting of this recipe; see --help")
    for name, value in values.items():
        flag = known[name]
        if value is None:
            continue
        try:
            if isinstance(value, dict) or isinstance(value, list) != (flag.nargs == "+"):
                raise ValueError
            convert = flag.type or str  # as if given as a flag: YAML reads 2e-3 as a word
            values[name] = [convert(str(v)) for v in value] if flag.nargs == "+" else convert(str(value))
        except (ValueError, ArgumentTypeError) as error:
            shown = str(value)[:100]
            raise UserError(f"{path}: {name}: {shown} is no value of this setting; see --help") from error
        if flag.choices and values[name] not in flag.choices:
            raise UserError(f"{path}: {name}: {value} is none of {', '.join(map(str, flag.choices))}")
    return values
