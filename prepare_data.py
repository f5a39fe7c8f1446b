"""Make slices to train on, and look at what is there.

    python prepare_data.py phantom --output_dir data/phantom --subjects 200   # a cohort made of MNI152
    python prepare_data.py check ADNI/AD_NC --table study.csv                 # what is in a folder or zip

Each command has its own --help.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adni_ldm.config import CheckConfig, PhantomConfig, class_names, parse_config
from adni_ldm.errors import UserError, run_recipe


def make_phantom(arguments: list[str]) -> None:
    """Write a synthetic cohort: real anatomy, known disease, no download."""
    cfg = parse_config(PhantomConfig, make_phantom.__doc__, arguments, prog="prepare_data.py phantom")
    try:
        from adni_ldm.data.phantom import write_phantom_cohort

        table = write_phantom_cohort(
            cfg.output_dir, cfg.subjects, cfg.slices, cfg.image_size, cfg.seed, cfg.workers
        )
    except ImportError as error:
        raise UserError(f"the phantom cohort needs {error.name}: pip install 'adni-ldm[scans]'") from error
    except FileExistsError as error:
        raise UserError(str(error)) from error
    print(f"{len(table)} slices of {cfg.subjects} subjects in {cfg.output_dir}")


def check(arguments: list[str]) -> int:
    """Say what is in a folder of slices, and whether it can be trained on; exit status 1 if not.

    Draws a contact sheet of each class and histograms into check/ of the current folder, or into --figures.
    """
    from adni_ldm.data.check import check_folder
    from adni_ldm.data.look import draw_check

    if arguments and not arguments[0].startswith("-"):  # the folder may stand alone
        arguments = ["--data_dir", *arguments]
    cfg = parse_config(CheckConfig, check.__doc__, arguments, prog="prepare_data.py check")
    report = check_folder(cfg.data_dir, class_names=class_names(cfg.classes), table=cfg.table)
    figures = Path(cfg.figures or "check")
    if cfg.figures is None and figures.resolve().is_relative_to(report.folder.resolve()):
        raise UserError("the pictures would land inside the data: give --figures DIR, or --figures none")
    drawn = [] if cfg.figures == "none" else draw_check(report, figures)
    print(report)
    if drawn:
        print(f"pictures: {', '.join(str(path) for path in drawn)}")
    return 0 if report.ok else 1


COMMANDS = {"phantom": make_phantom, "check": check}


def main() -> int | None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return 0
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}; there is {', '.join(COMMANDS)}")
    return COMMANDS[command](arguments)


if __name__ == "__main__":
    run_recipe(main)
