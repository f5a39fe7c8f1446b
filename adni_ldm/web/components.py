"""HTML of app.py: images, messages, a download and the verdicts.

gr.Gallery and gr.DownloadButton write every image and archive to a cache on disk, from where they are served
to anybody who has the URL. The HTML of this module contains them as data URLs instead: nothing is stored.
"""

import base64
import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import pandas as pd
from PIL import Image

from adni_ldm.data.cells import escape_table
from adni_ldm.hub.report import Report

CSS = """
.slices { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(9rem, 45%), 1fr)); gap: .75rem; }
.slices figure { margin: 0; } .slices img { width: 100%; border-radius: 4px; display: block; }
.slices figcaption { font-size: .85rem; padding: .2rem 0; overflow-wrap: anywhere; }
.message { min-height: 3.5rem; }
.alert { border-left: 4px solid #c62828; padding: .4rem .8rem; }
.verdicts { list-style: none; padding: 0; } .verdicts li { margin: .6rem 0; list-style: none; }
a.download { display: inline-block; margin-top: 1rem; padding: .6rem 1rem; }
a.download { border: 1px solid currentColor; border-radius: 6px; }
:focus-visible { outline: 3px solid #1565c0 !important; outline-offset: 2px; }
"""
# gradio gives a group of radio buttons no name: a screen reader would read "AD" without "Class".
HEAD = """<script>new MutationObserver(() => document.querySelectorAll('fieldset:not([aria-label])').forEach(
  group => group.setAttribute('aria-label', group.querySelector('[data-testid=block-info]')?.innerText ?? ''))
).observe(document, {childList: true, subtree: true})</script>"""


def gallery(images: Iterable[tuple[Image.Image, str]]) -> str:
    """Images with their captions, as many in a row as the window is wide."""
    figures = [
        f'<figure><img src="{_data_url(_png(image), "image/png")}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for image, caption in images
    ]
    return f'<div class="slices">{"".join(figures)}</div>'


def describe(label: str, conditions: Mapping[str, object]) -> str:
    """A class and conditions for people to read: "AD, age=75, sex=F"."""
    return ", ".join([label, *(f"{name}={value}" for name, value in conditions.items())])


def status(text: str) -> str:
    """A message that a screen reader reads out when it is idle."""
    return f'<p role="status">{escape(text)}</p>'


def progress_bar(step: int, steps: int) -> str:
    """How far sampling is. gr.Progress vanishes with every image that is shown before the last."""
    text = f"Step {step} of {steps}"
    return f'<progress aria-label="{text}" value="{step}" max="{steps}"></progress> {text}'


def alert(text: str) -> str:
    """An error message that a screen reader reads out at once."""
    return f'<p role="alert" class="alert">{escape(text)}</p>'


def download_link(name: str, images: Mapping[str, Image.Image], rows: Sequence[Mapping[str, object]]) -> str:
    """A link to a zip of {file name: image} and of a metadata.csv with the rows, an `imagefolder`."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path, image in images.items():
            file.writestr(path, _png(image))
        file.writestr("metadata.csv", escape_table(pd.DataFrame(rows)).to_csv(index=False))
    url = _data_url(archive.getvalue(), "application/zip")
    return f'<a class="download" download="{escape(name)}" href="{url}">Download PNGs and metadata</a>'


def verdict_list(report: Report) -> str:
    """The verdicts of the report, or why there are none."""
    if report.missing:
        return f"<p>This model was not evaluated: {escape(report.missing)}.</p>"
    items = [
        f'<li><span aria-hidden="true">{verdict.mark}</span> {escape(verdict.question)} '
        f"<strong>{verdict.answer}.</strong> {escape(verdict.text)}</li>"
        for verdict in report.verdicts
    ]
    return f'<ul class="verdicts">{"".join(items)}</ul>'


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _data_url(content: bytes, mime_type: str) -> str:
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"
