"""Settings of python -m adni_ldm.hub."""

from __future__ import annotations

from dataclasses import dataclass

from adni_ldm.config.classes import TABLE_HELP
from adni_ldm.config.parsing import setting


@dataclass(frozen=True)
class ShareConfig:
    """What both commands of python -m adni_ldm.hub ask."""

    repo_id: str | None = setting(None, "Repository of the Hub, ME/NAME; made where there is none.")
    data_dir: list[str] = setting(
        [],
        "Folders of the data that the model was trained on, which what is pushed is compared with. Default: "
        "the one in its training_config.json.",
    )
    table: str | None = setting(None, TABLE_HELP)
    report: str | None = setting(
        None, "Folder of evaluate.py's report on the model. Default: report/ in the model's folder."
    )
    public: bool = setting(False, "Everybody may see it; else it is private.")
    accept_privacy_risk: bool = setting(
        False, "Push although the report's verdict on privacy is bad, or there is none."
    )
    overwrite: bool = setting(False, "Replace all that is in a repository that holds something else.")
    license: str | None = setting(
        None,
        "Licence of what is pushed, by the Hub's word for it. Default: apache-2.0 where the data are the "
        "phantom cohort; else `other`, the agreement of ADNI, which covers what is derived from its data.",
    )
    dry_run: str | None = setting(
        None, "Folder that what would be pushed is written to, after it was looked through; nothing leaves."
    )


@dataclass(frozen=True)
class PushConfig(ShareConfig):
    """Settings of python -m adni_ldm.hub push."""

    folder: str = setting("runs/ldm", "Folder that train_ldm.py wrote; may stand without the flag.")
    allow_real_images: bool = setting(
        False, "Pictures of real scans may leave: the report's page and figures are pushed as well."
    )


@dataclass(frozen=True)
class PushSamplesConfig(ShareConfig):
    """Settings of python -m adni_ldm.hub push-samples."""

    folder: str = setting("samples", "Folder that sample.py wrote; may stand without the flag.")
