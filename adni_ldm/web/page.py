"""What app.py shows and takes, without the page: pictures as HTML, uploads, verdicts, a zip to keep.

Pictures are written into the page itself (data: addresses), so that nothing lies on the server's disk.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import to_pil_image

from adni_ldm.data.slices import prepare_image
from adni_ldm.errors import UserError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
SMALLEST, LARGEST = 32, 4096  # pixels a side of an upload
COLOURFUL = 12.0  # grey levels between the channels, mean over the picture, from which it is no scan
QUESTIONS = {
    "fidelity": "Do samples look like real slices?",
    "usefulness": "Do they teach what real slices teach?",
    "faithfulness": "Do they show the class asked for?",
    "privacy": "Are they nobody's scan?",
}


def read_upload(path: str | Path, side: int) -> np.ndarray:
    """A visitor's picture as a slice, uint8 (side, side), and the file removed, whatever becomes of it.

    Looks at the size before a pixel is decoded.

    Raises:
        UserError: not a grey picture of about a slice's shape; the message is for the visitor.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check_shape(image)
            image.load()
            _check_content(image)
            return prepare_image(image, side)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"This file is no picture. Choose a {', '.join(FORMATS)} file.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"This picture is too large: at most {LARGEST} pixels a side are taken.") from error
    except Exception as error:  # a damaged file makes PIL raise OSError, SyntaxError, struct.error ...
        raise UserError(
            "This picture is damaged and cannot be read. Save it again, or choose another."
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _check_shape(image: Image.Image) -> None:
    width, height = image.size
    if max(width, height) > LARGEST:
        raise UserError(f"This picture has {width} x {height} pixels: at most {LARGEST} a side are taken.")
    if min(width, height) < SMALLEST:
        raise UserError(
            f"This picture has {width} x {height} pixels: a slice needs {SMALLEST} a side or more."
        )
    if max(width, height) > 2 * min(width, height):
        raise UserError(f"This picture has {width} x {height} pixels: a slice is not that long and narrow.")
    if getattr(image, "n_frames", 1) > 1:
        raise UserError(f"This file holds {image.n_frames} pictures: save the one slice alone.")


def _check_content(image: Image.Image) -> None:
    if image.mode not in ("1", "L", "LA", "I;16", "I", "F"):
        small = image.convert("RGB").resize((128, 128))
        colours = np.asarray(small, dtype=np.int16)  # (128, 128, 3)
        if (colours.max(axis=2) - colours.min(axis=2)).mean() > COLOURFUL:
            raise UserError("This picture is in colour: a slice is grey. Is it a photograph?")
    darkest, brightest = np.reshape(image.getextrema(), (-1, 2)).T  # of each channel
    if (darkest == brightest).all():
        raise UserError("This picture is all of one grey: there is no slice in it.")


# ---- Pictures in the page ------------------------------------------------------------------------------


def as_picture(image: torch.Tensor) -> Image.Image:
    """A slice (1, H, W) in [0, 1] in 8 bits of grey."""
    return to_pil_image(image.clamp(0, 1))


def gallery(pictures: Iterable[tuple[Image.Image, str]]) -> str:
    """Pictures with the words beneath them, as many in a row as the window is wide."""
    figures = []
    for picture, caption in pictures:
        words = escape(caption)
        figures.append(
            f'<figure><img src="{_address(_png(picture), "image/png")}" alt="{words}">'
            f"<figcaption>{words}</figcaption></figure>"
        )
    return f'<div class="slices">{"".join(figures)}</div>'


def progress_bar(done: int, total: int) -> str:
    return (
        f'<div role="status"><label>Step {done} of {total} '
        f'<progress max="{total}" value="{done}"></progress></label></div>'
    )


def said(text: str) -> str:
    """A line that a screen reader reads out when it comes."""
    return f'<p role="status">{escape(text)}</p>'


def refused(text: str) -> str:
    """A line in words of what cannot be done, read out at once."""
    return f'<p role="alert" class="refused">{escape(text)}</p>'


def download(name: str, pictures: Mapping[str, Image.Image], rows: Sequence[Mapping[str, object]]) -> str:
    """A link that saves {file name: picture} and metadata.csv of the rows as one zip, an `imagefolder`."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for path, picture in pictures.items():
            file.writestr(path, _png(picture))
        file.writestr("metadata.csv", pd.DataFrame(rows).to_csv(index=False))
    address = _address(archive.getvalue(), "application/zip")
    return f'<a class="download" download="{escape(name)}" href="{address}">Download PNGs and metadata</a>'


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- The report's verdicts -----------------------------------------------------------------------------


def find_report(model: str, report: str | None) -> dict | None:
    """metrics.json of the folder `report`; else of the model's report/, its folder, report/ beside it, or the
    Hub. None where there is none.

    Raises:
        UserError: the folder given holds none, or the file is damaged.
    """
    folders = (
        [Path(report)] if report else [Path(model) / "report", Path(model), Path(model).parent / "report"]
    )
    path = next((folder / "metrics.json" for folder in folders if (folder / "metrics.json").is_file()), None)
    if path is None and report:
        raise UserError(f"--report {report}: no metrics.json in it; evaluate.py writes one")
    if path is None and not Path(model).exists():
        try:
            path = hf_hub_download(model, "metrics.json")
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
            return None
    try:
        return json.loads(Path(path).read_text()) if path else None
    except ValueError as error:
        raise UserError(f"{path}: not what evaluate.py writes ({error}); run it again") from error


def verdicts(metrics: Mapping | None, model_hash: str) -> str:
    """The four verdicts as a list, or why there are none."""
    how = "Make one with <code>python evaluate.py</code>, and start this page again."
    if metrics is None:
        return (
            f"<p>No report was made of this model: nobody has measured what its slices are worth. {how}</p>"
        )
    if metrics.get("model_hash", model_hash) != model_hash:
        return f"<p>The report found is on another model, and says nothing about this one. {how}</p>"
    lines = []
    for name, question in QUESTIONS.items():
        verdict = metrics.get("verdicts", {}).get(name) or {"good": None, "text": "Not measured."}
        sign, word = {True: ("✓", "Yes."), False: ("✗", "No.")}.get(verdict["good"], ("?", "Cannot be told."))
        lines.append(
            f'<li><span aria-hidden="true">{sign}</span> {question} <strong>{word}</strong> '
            f"{escape(str(verdict['text']))}</li>"
        )
    return f'<ul class="verdicts">{"".join(lines)}</ul>'
