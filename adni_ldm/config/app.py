"""Settings of app.py."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from adni_ldm.errors import UserError


@dataclass(frozen=True)
class AppConfig:
    """Settings of app.py."""

    model: str = HfArg(default="runs/ldm", help="Folder or Hub name of the pipeline that train_ldm.py wrote.")
    report: str | None = HfArg(
        default=None,
        help="Folder of the report of evaluate.py on the model. Default: report/ in the model's folder or "
        "beside it.",
    )
    host: str | None = HfArg(
        default=None,
        help="Address to listen on; 0.0.0.0 for all addresses of this machine. Default: accessible from this "
        "machine only.",
    )
    port: int = HfArg(default=7860, help="Port to listen on; 0 for any free port.")
    max_images: int = HfArg(default=16, help="Largest number of slices per request.")
    max_steps: int = HfArg(default=100, help="Largest number of denoising steps.")
    queue_size: int = HfArg(default=20, help="Largest number of waiting requests; further ones are refused.")
    max_upload_mb: int = HfArg(default=10, help="Largest size of an uploaded file, MB.")
    push_space: str | None = HfArg(
        default=None,
        help="Create a Hugging Face Space ME/NAME of this page, for a model that is on the Hub, and exit.",
    )
    public: bool = HfArg(default=False, help="Make the Space public; by default it is private.")

    def __post_init__(self):
        for name in ("max_images", "queue_size", "max_upload_mb"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.max_steps < 2 or not 0 <= self.port < 65536:
            raise UserError(f"--max_steps {self.max_steps} must be at least 2, --port {self.port} 0 to 65535")
