"""Decoding of an image file of any mode to 8-bit RGB, the centre crop of evaluation, and which files count as images."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from gclkern.training.extras import need
from gclkern.training.printable import printable

# Formats that PIL recognises but cannot decode by itself, and PDF, which is not meant as an image.
_NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"))
_SIXTEEN_BITS = 65535
BILINEAR = 2  # PIL's number


class CorruptImageError(RuntimeError):
    """An image file that cannot be read."""


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case, of all formats that PIL decodes here."""
    image = need("PIL.Image", "a data set of image files")
    image.init()
    return frozenset(suffix for suffix, kind in image.registered_extensions().items() if kind in image.OPEN and kind not in _NOT_DECODED) | {".mpo"}


def open_image(path: str, *, draft: bool = False) -> Any:
    """The image as a PIL image of mode RGB, rotated by its EXIF orientation; the first frame of an animation or a stack.

    Colours and 8-bit grey are unchanged. Transparent images are put on a white background. 16-bit grey is divided by 257, so that 0 to 65535 become 0 to 255:
    images that use 12 of 16 bits are dark, but keep their brightness relative to each other. Floats from 0 to 1 are multiplied by 255. Other floats and
    larger 32-bit integers are rejected, since the value of white is unknown.

    Args:
        path: the file.
        draft: for checking whether the file can be decoded: a JPEG is read completely, but at an eighth of its size.

    Raises:
        CorruptImageError: the file is missing, cannot be read or has values whose range is unknown; the message begins with its path.
    """
    shown = printable(path)
    try:
        with need("PIL.Image", "a data set of image files").open(path) as file:
            if draft:
                file.draft("RGB", (1, 1))
            upright = need("PIL.ImageOps", "a data set of image files").exif_transpose(file)
            return to_rgb(upright)
    except ImportError:
        raise
    except FileNotFoundError as error:
        raise CorruptImageError(f"{shown} does not exist") from error
    except Exception as error:  # decoders raise many kinds on a damaged file
        raise CorruptImageError(f"{shown} cannot be read as an image ({printable(str(error))})") from error


def to_rgb(image: Any) -> Any:
    """A PIL image of any mode converted to RGB, as :func:`open_image` describes."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = need("PIL.Image", "a data set of image files").new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        return white.convert("RGB")
    return image.convert("RGB")


def _grey(image: Any) -> Any:
    """An image of 16 or 32 bits a pixel in 8 bits."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(f"its pixels are floats from {low:g} to {high:g}, of which only 0 to 1 has a known white; save it with 8 or 16 bits")
        values *= 255
    else:
        if low < 0 or high > _SIXTEEN_BITS:
            raise ValueError(f"its pixels are 32-bit integers from {low:g} to {high:g}, of which only 0 to 65535 has a known white; save it with 8 or 16 bits")
        values /= _SIXTEEN_BITS // 255
    return need("PIL.Image", "a data set of image files").fromarray(np.round(values).astype(np.uint8))


def resize_and_crop(image: Any, *, resize: int, crop: int) -> Any:
    """The image resized and centre-cropped for evaluation; unchanged if it has the size already."""
    width, height = image.size
    if width == height == crop:
        return image
    longer = int(resize * max(width, height) / min(width, height))
    image = image.resize((resize, longer) if width < height else (longer, resize), resample=BILINEAR)
    left, top = round((image.width - crop) / 2), round((image.height - crop) / 2)
    return image.crop((left, top, left + crop, top + crop))
