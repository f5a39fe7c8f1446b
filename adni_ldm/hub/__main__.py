"""Push a model, or samples of it, to the Hugging Face Hub, with a model or dataset card.

    python -m adni_ldm.hub push runs/ldm --repo_id ME/NAME                  # private, unless --public
    python -m adni_ldm.hub push runs/ldm --repo_id ME/NAME --dry_run out    # only write what would be pushed
    python -m adni_ldm.hub push-samples samples --repo_id ME/NAME           # samples as a data set

Log in first: `hf auth login`. Each command has its own --help.
"""

from __future__ import annotations

from adni_ldm.config import PushConfig, PushSamplesConfig, parse_config, run_command
from adni_ldm.errors import run_recipe

PROG = "python -m adni_ldm.hub"


def push(arguments: list[str]) -> None:
    """Push a pipeline that train_ldm.py wrote, after a leak scan."""
    cfg = parse_config(PushConfig, push.__doc__, arguments, f"{PROG} push", positional="folder")
    from adni_ldm.hub.push import push_model

    push_model(**vars(cfg))


def push_samples(arguments: list[str]) -> None:
    """Push slices that sample.py wrote, after a leak scan, as a data set for `load_dataset`."""
    prog = f"{PROG} push-samples"
    cfg = parse_config(PushSamplesConfig, push_samples.__doc__, arguments, prog, positional="folder")
    from adni_ldm.hub.push import push_dataset

    push_dataset(**vars(cfg))


if __name__ == "__main__":
    run_recipe(lambda: run_command(__doc__, {"push": push, "push-samples": push_samples}))
