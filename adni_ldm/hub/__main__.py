"""Put a model, or slices that it drew, on the Hugging Face Hub, with a card.

    python -m adni_ldm.hub push runs/ldm --repo_id ME/NAME                  # private, unless --public
    python -m adni_ldm.hub push runs/ldm --repo_id ME/NAME --dry_run out    # only write what would be pushed
    python -m adni_ldm.hub push-samples samples --repo_id ME/NAME           # a data set of drawn slices

Log in first: `hf auth login`. Each command has its own --help.
"""

from __future__ import annotations

import sys

from adni_ldm.config import PushConfig, PushSamplesConfig, parse_config
from adni_ldm.errors import UserError, run_recipe


def push(arguments: list[str]) -> None:
    """Push a pipeline that train_ldm.py wrote, after it was looked through for what must not leave."""
    cfg = parse_config(PushConfig, push.__doc__, arguments, prog="python -m adni_ldm.hub push")
    from adni_ldm.hub.share import share_model

    share_model(**vars(cfg))


def push_samples(arguments: list[str]) -> None:
    """Push slices that sample.py drew, as a data set that `load_dataset` reads."""
    cfg = parse_config(
        PushSamplesConfig, push_samples.__doc__, arguments, prog="python -m adni_ldm.hub push-samples"
    )
    from adni_ldm.hub.share import share_samples

    share_samples(**vars(cfg))


COMMANDS = {"push": push, "push-samples": push_samples}


def main() -> int:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}; there is {', '.join(COMMANDS)}")
    if arguments and not arguments[0].startswith("-"):  # the folder may stand alone
        arguments = ["--folder", *arguments]
        COMMANDS[command](arguments)
    return 0


if __name__ == "__main__":
    run_recipe(main)
