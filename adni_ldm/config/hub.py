"""Settings of python -m adni_ldm.hub."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import TABLE_HELP


@dataclass(frozen=True)
class ShareConfig:
    """What both commands of python -m adni_ldm.hub ask."""

    repo_id: str | None = HfArg(
        default=None, help="Repository of the Hub, ME/NAME; made where there is none."
    )
    data_dir: list[str] = HfArg(
        default_factory=list,
        help="Folders of the data that the model was trained on, which what is pushed is compared with. "
        "Default: "
        "the one in its training_config.json.",
    )
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    report: str | None = HfArg(
        default=None,
        help="Folder of evaluate.py's report on the model. Default: report/ in the model's folder.",
    )
    public: bool = HfArg(default=False, help="Everybody may see it; else it is private.")
    accept_privacy_risk: bool = HfArg(
        default=False, help="Push although the report's verdict on privacy is bad, or there is none."
    )
    overwrite: bool = HfArg(
        default=False, help="Replace all that is in a repository that holds something else."
    )
    license: str | None = HfArg(
        default=None,
        help="Licence of what is pushed, by the Hub's word for it. Default: apache-2.0 where the data are "
        "the "
        "phantom cohort; else `other`, the agreement of ADNI, which covers what is derived from its data.",
    )
    dry_run: str | None = HfArg(
        default=None,
        help="Folder that what would be pushed is written to, after it was looked through; nothing leaves.",
    )


@dataclass(frozen=True)
class PushConfig(ShareConfig):
    """Settings of python -m adni_ldm.hub push."""

    folder: str = HfArg(
        default="runs/ldm", help="Folder that train_ldm.py wrote; may stand without the flag."
    )
    allow_real_images: bool = HfArg(
        default=False,
        help="Pictures of real scans may leave: the report's page and figures are pushed as well.",
    )


@dataclass(frozen=True)
class PushSamplesConfig(ShareConfig):
    """Settings of python -m adni_ldm.hub push-samples."""

    folder: str = HfArg(default="samples", help="Folder that sample.py wrote; may stand without the flag.")
