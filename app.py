"""The model in a browser: sample slices, compare classes, compute the counterfactual of an uploaded slice.

    python app.py --model runs/ldm                         # at http://127.0.0.1:7860, for this machine only
    python app.py --model ME/MODEL --push_space ME/NAME    # create a Hugging Face Space of this page

Needs the extra `app`: pip install 'adni-ldm[app]'. Uploaded and generated images are not stored.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import numpy as np
import torch
from PIL import Image

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError:
    sys.exit("app.py: error: gradio is not installed: pip install 'adni-ldm[app]'")

from adni_ldm.config import AppConfig, parse_config
from adni_ldm.counterfactual import make_counterfactual
from adni_ldm.data.provenance import model_records
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import colour_limit, difference_image, to_pil
from adni_ldm.generation import generate_progressively, hash_pipeline, image_seed
from adni_ldm.hub.report import find_report
from adni_ldm.hub.space import push_space
from adni_ldm.loading import load_pipeline
from adni_ldm.precision import choose_precision
from adni_ldm.web import components
from adni_ldm.web.fields import condition_fields, sampling_fields, seed_field
from adni_ldm.web.guard import Guard, is_open, read_accounts
from adni_ldm.web.uploads import read_upload

UPLOAD_SECONDS = 600  # that an upload is kept if no visitor's page has it read
PREVIEWS = 10  # intermediate images shown while sampling
ABOUT = """# Brain MRI slices by diagnosis

A latent diffusion model samples brain MRI slices conditioned on diagnosis. **For research only.** No image is
evidence of a disease, or of its absence, in any person."""


def main() -> None:
    beside = Path(__file__).with_name("app.yaml")  # the settings of a Space
    arguments = sys.argv[1:] or (["--config", str(beside)] if beside.is_file() else [])
    cfg = parse_config(AppConfig, __doc__, arguments)
    if cfg.push_space:
        print(f"pushed to {push_space(cfg.push_space, Path(__file__), cfg.model, cfg.public)}")
        return
    if is_open(cfg.host) and not (cfg.auth or cfg.no_auth):
        raise UserError("--host: others can connect; give a file of passwords with --auth, or --no_auth")
    accounts = read_accounts(cfg.auth) if cfg.auth else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # by which a server is stopped: remove uploads
    with tempfile.TemporaryDirectory(prefix="adni_ldm_app_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # of uploads until they are read
        guard = {"host": cfg.host, "allowed_hosts": cfg.allowed_hosts, "max_upload": cfg.max_upload_mb << 20}
        build_page(cfg).queue(max_size=cfg.queue_size, default_concurrency_limit=1).launch(
            server_name=cfg.host,  # None: GRADIO_SERVER_NAME, which a Space sets, or 127.0.0.1
            server_port=cfg.port or None,
            auth=accounts,
            app_kwargs={"middleware": [Middleware(Guard, folder=uploads, **guard)]},
            max_file_size=f"{cfg.max_upload_mb}mb",
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # no fonts from other servers
            css=components.CSS,
            head=components.HEAD,
            footer_links=[],
            ssr_mode=False,
            state_session_capacity=200,
        )


def build_page(cfg: AppConfig) -> gr.Blocks:
    """The page, with the model loaded.

    Raises:
        UserError: the model cannot be loaded, or the report cannot be read.
    """
    model = Model(cfg)
    first, last = model.classes[0], model.classes[-1]
    options = {"analytics_enabled": False, "delete_cache": (UPLOAD_SECONDS // 10, UPLOAD_SECONDS)}
    with gr.Blocks(title="Brain MRI slices by diagnosis", **options) as page:
        gr.Markdown(ABOUT)
        with gr.Tab("Sample"), gr.Row():
            with gr.Column(min_width=300):
                label = gr.Radio(model.classes, value=first, label="Class")
                number = gr.Slider(
                    1, cfg.max_images, min(4, cfg.max_images), step=1, label="Number of slices"
                )
                inputs = [label, number, *sampling_fields(model.sampling, cfg.max_steps), seed_field()]
                inputs += condition_fields(model.conditions)
                button = gr.Button("Sample", variant="primary")
            on_click(button, model.sample, inputs)
        with gr.Tab("Compare classes"), gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("One slice of each class, sampled from the same noise, and their difference.")
                source = gr.Radio(model.classes, value=last, label="From class")
                target = gr.Radio(model.classes, value=first, label="To class")
                inputs = [source, target, *sampling_fields(model.sampling, cfg.max_steps), seed_field()]
                inputs += condition_fields(model.conditions)
                button = gr.Button("Compare", variant="primary")
            on_click(button, model.compare, inputs)
        with gr.Tab("Counterfactual"), gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown(
                    "An uploaded slice in another class. It should resemble the training data: a T1-weighted "
                    "slice of the same plane, anterior to the left. It is not stored."
                )
                upload = gr.File(label=f"Slice: PNG or JPEG, at most {cfg.max_upload_mb} MB", height=140)
                upload.preprocess = lambda file: (
                    file and file.path
                )  # gr.File's leaves an empty file beside it
                pixels, accepted = gr.State(None, time_to_live=600), gr.HTML()
                source = gr.Radio(model.classes, value=None, label="Class of the slice")
                target = gr.Radio(model.classes, value=first, label="Target class")
                strength = gr.Slider(0, 1, 0.8, step=0.05, label="Strength: how far the slice is noised")
                inputs = [pixels, source, target, strength, *sampling_fields(model.sampling, cfg.max_steps)]
                inputs += condition_fields(model.conditions, "{} of the slice", "not known")
                inputs += condition_fields(model.conditions, "Target {}", "as the slice")
                button = gr.Button("Compute counterfactual", variant="primary")
            quiet = {"api_visibility": "private", "show_progress": "hidden"}
            upload.upload(model.accept, upload, [upload, pixels, accepted], **quiet)
            on_click(button, model.counterfactual, inputs)
        with gr.Tab("Evaluation"):
            gr.HTML(components.verdict_list(find_report(cfg.model, cfg.report, model.hash, model.data)))
    return page


def on_click(button: gr.Button, function, inputs: list) -> None:
    """When clicked, show a message and images beside the inputs, or below them on a narrow screen.

    All buttons share one queue, since they share one model.
    """
    with gr.Column(min_width=300):
        message, images = gr.HTML(elem_classes="message"), gr.HTML()
    options = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    button.click(function, inputs, [message, images], show_progress_on=message, **options)


class Model:
    """The pipeline and the functions of the buttons, which give a message and images as HTML."""

    def __init__(self, cfg: AppConfig):
        self.pipeline = load_pipeline(cfg.model)
        self.pipeline.set_progress_bar_config(disable=True)
        if torch.accelerator.is_available():
            self.pipeline.to(torch.accelerator.current_accelerator())
        self.classes = list(self.pipeline.class_embedding.config.class_names)
        embedding = self.pipeline.condition_embedding
        self.conditions = embedding.config.conditions if embedding else {}
        self.side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        self.sampling = self.pipeline.sampling_settings()
        self.hash = hash_pipeline(self.pipeline)
        self.data = {record["hash"] for record in model_records(self.pipeline.components)}
        self.precision = choose_precision(None)

    def sample(
        self,
        label: str,
        number: int,
        steps: int,
        guidance: float,
        seed: int,
        *conditions: object,
    ) -> Iterator[tuple[str, str]]:
        """The slices that sample.py generates for this seed."""
        labels, seeds = [label] * number, [image_seed(seed, index) for index in range(number)]
        asked, refusal = self._asked_for(conditions)
        if refusal:
            yield components.alert(refusal), ""
            return
        for step, images in self._denoise(labels, seeds, steps, guidance, asked):
            images = [to_pil(image) for image in images]
            shown = components.gallery((image, f"{label} {index}") for index, image in enumerate(images))
            yield components.progress_bar(step, steps), shown
        files = {f"{label}/{index:06d}.png": image for index, image in enumerate(images)}
        rows = self._metadata(files, labels, seeds, steps, guidance, asked)
        shown += components.download_link("slices.zip", files, rows)
        described = components.describe(label, asked)
        yield components.status(f"{number} slices of class {described}, seed {seed}."), shown

    def compare(
        self,
        source: str,
        target: str,
        steps: int,
        guidance: float,
        seed: int,
        *conditions: object,
    ) -> Iterator[tuple[str, str]]:
        """One slice of each class from the same noise, and their difference."""
        asked, refusal = self._asked_for(conditions)
        if refusal or source == target:
            yield components.alert(refusal or "Choose two different classes."), ""
            return
        seeds = [image_seed(seed, 0)] * 2
        for step, images in self._denoise([source, target], seeds, steps, guidance, asked):
            difference = images[1] - images[0]  # (1, H, W)
            limit = colour_limit(difference)
            images = [*map(to_pil, images), difference_image(difference, limit)]
            captions = (source, target, caption_difference(f"{target} − {source}", limit))
            shown = components.gallery(zip(images, captions))
            yield components.progress_bar(step, steps), shown
        files = dict(zip((f"{source}.png", f"{target}.png", "difference.png"), images))
        labels, seeds = [source, target, "difference"], [*seeds, seeds[0]]
        rows = self._metadata(files, labels, seeds, steps, guidance, asked)
        shown += components.download_link("comparison.zip", files, rows)
        yield components.status(f"Both slices were sampled with seed {seed}."), shown

    def accept(self, path: str) -> tuple[None, np.ndarray | None, str]:
        """Clear the upload field, keep the slice (H, W) in the session, and show it, or why it is refused."""
        try:
            pixels = read_upload(path, self.side)
        except UserError as error:
            return None, None, components.alert(str(error))
        return None, pixels, components.gallery([(Image.fromarray(pixels), "Uploaded slice")])

    def counterfactual(
        self,
        pixels: np.ndarray | None,
        source: str | None,
        target: str,
        strength: float,
        steps: int,
        guidance: float,
        *conditions: object,
    ) -> tuple[str, str]:
        """The uploaded slice in the target class, and its reconstruction error in its own class.

        `conditions` are those of the slice and then the target ones, which are kept where none is given.
        """
        if pixels is None:
            return components.alert("Upload a slice first."), ""
        count = len(self.conditions)
        own, refusal = self._asked_for(conditions[:count])
        changed, target_refusal = self._asked_for(conditions[count:])
        changed = own | changed
        if source is None or (source == target and changed == own):
            missing = "two different classes" if source else "the class of the slice"
            other = ", or another target condition" if source and self.conditions else ""
            return components.alert(f"Choose {missing}{other}."), ""
        if refusal or target_refusal:
            return components.alert(refusal or target_refusal), ""
        options = {"strength": strength, "num_inference_steps": steps, "guidance_scale": guidance}
        asked = {"conditions": own, "target_conditions": changed}
        result = make_counterfactual(self.pipeline, torch.tensor(pixels), source, target, **asked, **options)
        before, after = components.describe(source, own), components.describe(target, changed)
        limit = colour_limit(result.difference)
        given = torch.tensor(pixels)[None] / 255  # (1, H, W), [0, 1]
        image = to_pil(result.images[0] / 2 + 0.5)
        difference = difference_image(result.difference[0], limit)
        error_map = difference_image(result.round_trip[0] / 2 + 0.5 - given, limit)
        shown = components.gallery(
            [
                (Image.fromarray(pixels), f"Uploaded slice, {before}"),
                (image, f"Counterfactual, {after}"),
                (difference, caption_difference(f"{after} − uploaded slice", limit)),
                (error_map, f"Reconstruction error as {before}, same colours"),
            ]
        )
        error = float(result.error.mean())
        row = {"label": target, **changed, "from": source}
        row |= {f"from_{name}": value for name, value in own.items()} | options
        row |= {"round_trip_error": error, "model_hash": self.hash}
        files = {"counterfactual.png": image, "difference.png": difference}
        rows = [{"file_name": name, **row} for name in files]
        text = (
            f"Mean reconstruction error: {error:.3f} of the grey range. Do not interpret a difference that "
            "is no stronger than the reconstruction error."
        )
        shown += components.download_link("counterfactual.zip", files, rows)
        return components.status(text), shown

    def _asked_for(self, values: Sequence[object]) -> tuple[dict[str, object], str]:
        """{condition: value} of the fields that were filled in, and why the model refuses them, or ""."""
        asked = {name: value for name, value in zip(self.conditions, values) if value not in (None, "")}
        try:
            self.pipeline.condition_rows(asked, 1)
        except ValueError as error:
            return asked, str(error)
        return asked, ""

    def _denoise(
        self, labels: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, asked: dict
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, images (B, 1, H, W) in [0, 1]) at PREVIEWS steps on the way, and at last the samples."""
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "conditions": asked}
        every = max(1, steps // PREVIEWS)
        numbers = self.pipeline.class_embedding.labels_of(labels)
        previews = generate_progressively(self.pipeline, numbers, seeds, every, self.precision, **options)
        for step, images in previews:
            yield step, images.clamp(0, 1)

    def _metadata(self, files, labels, seeds, steps: int, guidance: float, asked: dict) -> list[dict]:
        """Rows of metadata.csv, as sample.py writes them."""
        settings = self.pipeline.sampling_settings(steps, guidance) | {"scheduler": "ddim"}
        settings |= {"precision": self.precision, "model_hash": self.hash}
        return [
            {"file_name": name, "label": label, "seed": seed, **asked, **settings}
            for name, label, seed in zip(files, labels, seeds)
        ]


def caption_difference(difference: str, limit: float) -> str:
    return f"{difference}: red is brighter, blue darker, by at most {limit:.2f}"


if __name__ == "__main__":
    run_recipe(main)
