"""Which uploaded files app.py accepts as a slice."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from adni_ldm.data.folder import IMAGE_FORMATS
from adni_ldm.data.slices import prepare_image
from adni_ldm.errors import UserError

MIN_SIDE, MAX_SIDE = 32, 4096  # pixels
MAX_COLOUR = 12.0  # difference between the channels in grey levels, mean over the image


def read_upload(path: str | Path, side: int) -> np.ndarray:
    """An uploaded image as a slice, uint8 (side, side). Deletes the file in any case.

    The size is checked before any pixel is decoded. Raises UserError, with a message for the visitor, unless
    it is a greyscale image in the shape of a slice.
    """
    path = Path(path)
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            _check_shape(image)
            image.load()
            _check_content(image)
            return prepare_image(image, side)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"This file is not an image. Choose a {', '.join(IMAGE_FORMATS)} file.") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"This image is too large: at most {MAX_SIDE} pixels per side.") from error
    except Exception as error:  # a damaged file makes PIL raise OSError, SyntaxError, struct.error ...
        raise UserError(
            "This image is damaged and cannot be read. Save it again, or choose another."
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _check_shape(image: Image.Image) -> None:
    width, height = image.size
    size = f"This image has {width} x {height} pixels"
    if max(width, height) > MAX_SIDE:
        raise UserError(f"{size}: at most {MAX_SIDE} per side.")
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{size}: a slice needs at least {MIN_SIDE} per side.")
    if max(width, height) > 2 * min(width, height):
        raise UserError(f"{size}: its sides may differ by a factor of two at most.")
    if getattr(image, "n_frames", 1) > 1:
        raise UserError(f"This file contains {image.n_frames} images: save one slice alone.")


def _check_content(image: Image.Image) -> None:
    if image.mode not in ("1", "L", "LA", "I;16", "I", "F"):
        small = image.convert("RGB").resize((128, 128))
        colours = np.asarray(small, dtype=np.int16)  # (128, 128, 3)
        if (colours.max(axis=2) - colours.min(axis=2)).mean() > MAX_COLOUR:
            raise UserError("This image is in colour: a slice is greyscale. Is it a photograph?")
    darkest, brightest = np.reshape(image.getextrema(), (-1, 2)).T  # of each channel
    if (darkest == brightest).all():
        raise UserError("This image is uniform: it shows no slice.")
