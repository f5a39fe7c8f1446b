"""Settings of python -m adni_ldm.hub."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.classes import TABLE_HELP


@dataclass(frozen=True)
class SharedConfig:
    """Settings of both commands."""

    repo_id: str | None = HfArg(default=None, help="Repository on the Hub, ME/NAME; created if missing.")
    data_dir: list[str] = HfArg(
        default_factory=list,
        help="Folders of all data that U-Net and VAE were trained on, for the leak scan. Default: that of "
        "training_config.json.",
    )
    table: str | None = HfArg(default=None, help=TABLE_HELP)
    report: str | None = HfArg(
        default=None,
        help="Folder of evaluate.py's report on the model and its data. Default: report/ in its folder.",
    )
    public: bool = HfArg(default=False, help="Make the repository public; by default it is private.")
    accept_privacy_risk: bool = HfArg(
        default=False, help="Push although the verdict on privacy is unfavourable, or there is none."
    )
    overwrite: bool = HfArg(default=False, help="Replace all content of a repository of something else.")
    license: str | None = HfArg(
        default=None,
        help="License, by its identifier on the Hub. Default: for the phantom cohort that of the base model, "
        "else apache-2.0; otherwise `other` with the data use agreement of ADNI, which covers derived data.",
    )
    dry_run: str | None = HfArg(
        default=None, help="Run the leak scan, write what would be pushed to this folder, upload nothing."
    )


@dataclass(frozen=True)
class PushConfig(SharedConfig):
    """Settings of python -m adni_ldm.hub push."""

    folder: str = HfArg(default="runs/ldm", help="Folder that train_ldm.py wrote; the flag may be omitted.")
    allow_real_images: bool = HfArg(
        default=False,
        help="Push the report's page and figures as well, which show real scans; no image is then compared "
        "with the training data.",
    )


@dataclass(frozen=True)
class PushSamplesConfig(SharedConfig):
    """Settings of python -m adni_ldm.hub push-samples."""

    folder: str = HfArg(default="samples", help="Folder that sample.py wrote; the flag may be omitted.")
