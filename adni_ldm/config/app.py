"""Settings of app.py."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.config.parsing import check_at_least
from adni_ldm.errors import UserError


@dataclass(frozen=True)
class AppConfig:
    """Settings of app.py."""

    model: str = HfArg(default="runs/ldm", help="Folder or Hub name of the pipeline that train_ldm.py wrote.")
    report: str | None = HfArg(
        default=None, help="Folder of evaluate.py's report. Default: report/ in the model's folder or beside."
    )
    host: str | None = HfArg(
        default=None, help="Address to listen on; 0.0.0.0 for all. Default: this machine only."
    )
    auth: str | None = HfArg(
        default=None, help="File with a line NAME:PASSWORD for each visitor; needed where others can connect."
    )
    no_auth: bool = HfArg(default=False, help="Let anybody who can connect use the page, without a password.")
    allowed_hosts: list[str] = HfArg(
        default_factory=list,
        help="Further names by which visitors reach the page, such as that of a proxy before it.",
    )
    port: int = HfArg(default=7860, help="Port to listen on; 0 for any free port.")
    max_images: int = HfArg(default=16, help="Largest number of slices per request.")
    max_steps: int = HfArg(default=100, help="Largest number of denoising steps.")
    queue_size: int = HfArg(default=20, help="Largest number of waiting requests; further ones are refused.")
    max_upload_mb: int = HfArg(default=10, help="Largest size of an upload, MB.")
    push_space: str | None = HfArg(
        default=None,
        help="Create a Hugging Face Space ME/NAME of this page, for a model on the Hub, and exit.",
    )
    public: bool = HfArg(default=False, help="Make the Space public; by default it is private.")

    def __post_init__(self):
        check_at_least(1, self, "max_images", "queue_size", "max_upload_mb")
        check_at_least(2, self, "max_steps")
        if not 0 <= self.port < 65536:
            raise UserError(f"--port {self.port} must be 0 to 65535")
        if self.auth and self.no_auth:
            raise UserError("--auth and --no_auth exclude each other")
