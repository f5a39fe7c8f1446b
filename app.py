"""The model in a browser: draw slices, compare the classes, redraw a slice of your own.

    python app.py --model runs/ldm                         # at http://127.0.0.1:7860, for this machine alone
    python app.py --model ME/MODEL --push_space ME/NAME    # make a Hugging Face Space of this page

Needs the extra `app`: pip install 'adni-ldm[app]'. Nothing that visitors upload is kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import numpy as np
import torch

try:
    import gradio as gr
except ImportError:
    sys.exit("app.py: error: gradio is not installed: pip install 'adni-ldm[app]'")

from adni_ldm.config import AppConfig, parse_config
from adni_ldm.counterfactual import redraw
from adni_ldm.errors import UserError, run_recipe
from adni_ldm.figures import colour_limit, difference_picture
from adni_ldm.generation import generate_progressively, hash_pipeline, image_seed
from adni_ldm.hub.space import push_space
from adni_ldm.loading import load_pipeline
from adni_ldm.precision import choose_precision
from adni_ldm.web import page as web

LOOKS = 10  # times that a drawing is shown on its way
CSS = """
.slices { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9rem, 45%), 1fr)); gap: .75rem; }
.slices figure { margin: 0; } .slices img { width: 100%; border-radius: 4px; display: block; }
.slices figcaption { font-size: .85rem; padding: .2rem 0; overflow-wrap: anywhere; }
.refused { border-left: 4px solid #c62828; padding: .4rem .8rem; }
.verdicts { list-style: none; padding: 0; } .verdicts li { margin: .6rem 0; list-style: none; }
progress { width: 100%; height: 1rem; accent-color: #1565c0; }
a.download { display: inline-block; margin-top: 1rem; padding: .6rem 1rem; }
a.download { border: 1px solid currentColor; border-radius: 6px; }
:focus-visible { outline: 3px solid #1565c0 !important; outline-offset: 2px; }
"""
# gradio names no group of radio buttons, so that a screen reader would say "AD" and not of what
HEAD = """<script>new MutationObserver(() => document.querySelectorAll('fieldset:not([aria-label])').forEach(
  group => group.setAttribute('aria-label', group.querySelector('[data-testid=block-info]')?.innerText ?? ''))
).observe(document, {childList: true, subtree: true})</script>"""
ABOUT = """# Brain slices by diagnosis

A latent diffusion model draws sagittal brain MRI slices of the class that you ask for. **For research.** It
says nothing about anybody's health: no picture here is evidence of a disease, or of its absence."""


def main() -> None:
    beside = Path(__file__).with_name("app.yaml")  # a Space has its settings there
    arguments = sys.argv[1:] or (["--config", str(beside)] if beside.is_file() else [])
    cfg = parse_config(AppConfig, __doc__, arguments)
    if cfg.push_space:
        print(f"pushed to {push_space(cfg.push_space, Path(__file__), cfg.model, cfg.public)}")
        return
    with tempfile.TemporaryDirectory(prefix="adni_ldm_app_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # what comes in lies here until it is read, and goes with us
        build_page(cfg).queue(max_size=cfg.queue_size, default_concurrency_limit=1).launch(
            server_name=cfg.host,  # None: GRADIO_SERVER_NAME, which a Space sets, or 127.0.0.1
            server_port=cfg.port or None,
            max_file_size=f"{cfg.max_upload_mb}mb",
            theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # nothing from elsewhere
            css=CSS,
            head=HEAD,
            footer_links=[],
            ssr_mode=False,
            state_session_capacity=200,
        )


def build_page(cfg: AppConfig) -> gr.Blocks:
    """The page, with the model loaded.

    Raises:
        UserError: there is no model, or the report is damaged.
    """
    model = Model(cfg)
    with gr.Blocks(
        title="Brain slices by diagnosis", analytics_enabled=False, delete_cache=(60, 600)
    ) as page:
        gr.Markdown(ABOUT)
        with gr.Tab("Draw"), gr.Row():
            with gr.Column(min_width=300):
                which = gr.Radio(model.classes, value=model.classes[0], label="Class")
                number = gr.Slider(
                    1, cfg.max_images, min(4, cfg.max_images), step=1, label="Number of slices"
                )
                settings = choose_settings(cfg)
                button = gr.Button("Draw", variant="primary")
            on_click(button, model.draw, [which, number, *settings], output_column())
        with gr.Tab("Compare"), gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown("Two classes from the same noise: what differs is what the class changes.")
                one = gr.Radio(model.classes, value=model.classes[-1], label="From class")
                other = gr.Radio(model.classes, value=model.classes[0], label="To class")
                settings = choose_settings(cfg)
                button = gr.Button("Compare", variant="primary")
            on_click(button, model.compare, [one, other, *settings], output_column())
        with gr.Tab("Your slice"), gr.Row():
            with gr.Column(min_width=300):
                gr.Markdown(
                    "A slice as it would look in another class. It should be like those that the model was "
                    "trained on: a T1 slice of the same plane, anterior to the left. It is read and not kept."
                )
                upload = gr.File(label=f"Slice: a PNG or JPEG of at most {cfg.max_upload_mb} MB", height=140)
                pixels, taken = gr.State(None, time_to_live=600), gr.HTML()
                source = gr.Radio(model.classes, value=None, label="Class that the slice has")
                target = gr.Radio(model.classes, value=model.classes[0], label="Class that it gets")
                strength = gr.Slider(0, 1, 0.8, step=0.05, label="Strength: how much the class may change")
                settings = choose_settings(cfg, seeded=False)
                button = gr.Button("Redraw", variant="primary")
            quiet = {"api_visibility": "private", "show_progress": "hidden"}
            upload.upload(model.take, upload, [upload, pixels, taken], **quiet)
            on_click(button, model.redraw, [pixels, source, target, strength, *settings], output_column())
        with gr.Tab("What it is worth"):
            gr.HTML(web.verdicts(web.find_report(cfg.model, cfg.report), model.hash))
    return page


def choose_settings(cfg: AppConfig, seeded: bool = True) -> list[gr.components.Component]:
    chosen = [
        gr.Slider(2, cfg.max_steps, min(30, cfg.max_steps), step=1, label="Denoising steps"),
        gr.Slider(0, 5, 1.5, step=0.1, label="Guidance: how strongly the class shows"),
    ]
    if seeded:
        chosen.append(gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed"))
    return chosen


def output_column() -> list[gr.HTML]:
    """How far it is, and the pictures: beside the settings, or beneath them on a telephone."""
    with gr.Column(min_width=300):
        return [gr.HTML(), gr.HTML()]


def on_click(button: gr.Button, function, inputs: list, outputs: list) -> None:
    """All buttons wait in one line, since they share one model."""
    options = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
    button.click(function, inputs, outputs, show_progress="minimal", show_progress_on=outputs[0], **options)


class Model:
    """The pipeline, and what the buttons do: each gives a line that says how far it is, and pictures."""

    def __init__(self, cfg: AppConfig):
        self.pipeline = load_pipeline(cfg.model)
        self.pipeline.set_progress_bar_config(disable=True)
        if torch.accelerator.is_available():
            self.pipeline.to(torch.accelerator.current_accelerator())
        self.classes = list(self.pipeline.class_embedding.config.class_names)
        self.side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        self.hash = hash_pipeline(self.pipeline)
        self.precision = choose_precision(None)

    def draw(self, which: str, number: int, steps: int, guidance: float, seed: int) -> Iterator[tuple]:
        seeds = [image_seed(seed, index) for index in range(number)]  # as sample.py has them
        for done, images in self._steps([which] * number, seeds, steps, guidance):
            pictures = [web.as_picture(image) for image in images]
            shown = web.gallery((one, f"{which} {index}") for index, one in enumerate(pictures))
            yield web.progress_bar(done, steps), shown
        files = {f"{which}/{index:06d}.png": picture for index, picture in enumerate(pictures)}
        rows = self._rows(files, [which] * number, seeds, steps, guidance)
        yield web.said(f"{number} drawn, seed {seed}."), shown + web.download("slices.zip", files, rows)

    def compare(self, one: str, other: str, steps: int, guidance: float, seed: int) -> Iterator[tuple]:
        if one == other:
            yield web.refused("Choose two different classes."), ""
            return
        seeds = [image_seed(seed, 0)] * 2
        for done, images in self._steps([one, other], seeds, steps, guidance):
            pictures = [web.as_picture(image) for image in images]
            difference = images[1] - images[0]
            limit = max(0.05, float(difference.abs().max()))
            pictures.append(difference_picture(difference, limit))
            captions = [one, other, f"{other} − {one}: red is brighter, blue darker, by at most {limit:.2f}"]
            shown = web.gallery(zip(pictures, captions))
            yield web.progress_bar(done, steps), shown
        files = dict(zip((f"{one}.png", f"{other}.png", "difference.png"), pictures))
        rows = self._rows(files, [one, other, "difference"], [*seeds, seeds[0]], steps, guidance)
        yield web.said(f"Both drawn from seed {seed}."), shown + web.download("comparison.zip", files, rows)

    def take(self, path: str) -> tuple:
        """An upload: empties the field, remembers the slice or None, and shows a picture or words."""
        try:
            pixels = web.read_upload(path, self.side)
        except UserError as error:
            return None, None, web.refused(str(error))
        return None, pixels, web.gallery([(web.as_picture(torch.tensor(pixels)[None] / 255), "Your slice")])

    def redraw(
        self,
        pixels: np.ndarray | None,
        source: str,
        target: str,
        strength: float,
        steps: int,
        guidance: float,
    ) -> Iterator[tuple]:
        if pixels is None or not source or source == target:
            missing = "Upload a slice first." if pixels is None else "Choose the class that the slice has."
            if source and source == target:
                missing = "Choose two different classes."
            yield web.refused(missing), ""
            return
        yield web.said("Redrawing …"), ""
        options = {"strength": strength, "num_inference_steps": steps, "guidance_scale": guidance}
        result = redraw(self.pipeline, torch.tensor(pixels), source, target, **options)
        limit = colour_limit(result)
        given = torch.tensor(pixels)[None] / 255  # (1, H, W), [0, 1]
        back = result.round_trip[0] / 2 + 0.5
        new = web.as_picture(result.images[0] / 2 + 0.5)
        difference = difference_picture(result.difference[0], limit)
        shown = web.gallery(
            [
                (web.as_picture(given), f"Your slice, {source}"),
                (new, f"As {target}"),
                (difference, f"{target} − yours: red is brighter, blue darker, by at most {limit:.2f}"),
                (difference_picture(back - given, limit), f"Error: there and back as {source}, same colours"),
            ]
        )
        error = float(result.error.mean())
        row = {"label": target, "from": source, **options, "round_trip_error": error, "model_hash": self.hash}
        files = {"counterfactual.png": new, "difference.png": difference}
        words = f"Mean error of the way there and back: {error:.3f} of the grey range. "
        words += "Read nothing into a difference that is no stronger than what the error map shows."
        rows = [{"file_name": name, **row} for name in files]
        yield web.said(words), shown + web.download("counterfactual.zip", files, rows)

    def _steps(self, labels, seeds, steps: int, guidance: float):
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        every = max(1, steps // LOOKS)
        numbers = self.pipeline.class_embedding.labels_of(labels)
        return generate_progressively(self.pipeline, numbers, seeds, every, self.precision, **options)

    def _rows(self, files, labels, seeds, steps: int, guidance: float) -> list[dict]:
        same = {"num_inference_steps": steps, "guidance_scale": guidance, "eta": 0.0, "scheduler": "ddim"}
        same |= {"precision": self.precision, "model_hash": self.hash}
        return [
            {"file_name": name, "label": label, "seed": seed, **same}
            for name, label, seed in zip(files, labels, seeds)
        ]


if __name__ == "__main__":
    run_recipe(main)
