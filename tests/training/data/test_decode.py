"""Whatever mode an image file has, its brightness arrives, or it is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from gclkern.training.data.decode import CorruptImageError, image_suffixes, open_image, resize_and_crop

RAMP = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)


def decoded(image: Any, path: Path, **options: Any) -> np.ndarray[Any, Any]:
    image.save(path, **options)
    found = open_image(str(path))
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (RAMP, "png"),
        (RAMP.astype(np.uint16) * 257, "png"),
        (RAMP.astype(np.uint16) * 257, "tif"),
        ((RAMP.astype(np.uint16) * 257).astype(">u2"), "tif"),
        (RAMP.astype(np.int32) * 257, "tif"),
        (RAMP.astype(np.float32) / 255, "tif"),
    ],
)
def test_grey_of_any_depth_keeps_its_range(values: np.ndarray[Any, Any], suffix: str, tmp_path: Path) -> None:
    found = decoded(Image.fromarray(values), tmp_path / f"ramp.{suffix}")
    assert np.array_equal(found, np.repeat(RAMP[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, 2.5]], np.float32), "floats from 0 to 2.5, of which only 0 to 1 has a known white"),
        (np.array([[0.0, np.nan]], np.float32), "floats from nan to nan"),
        (np.array([[0, 70000]], np.int32), "32-bit integers from 0 to 70000"),
        (np.array([[-1, 5]], np.int32), "32-bit integers from -1 to 5"),
    ],
)
def test_a_range_that_is_unknown_is_refused(values: np.ndarray[Any, Any], message: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(CorruptImageError, match=rf"^\S*x\.tif cannot be read as an image .*{message}.*save it with 8 or 16 bits"):
        open_image(str(tmp_path / "x.tif"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_what_is_transparent_is_white(mode: str, tmp_path: Path) -> None:
    """Left half black and opaque; right half transparent, with a red that nobody sees."""
    layers = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    layers.paste((0, 0, 0, 255), (0, 0, 2, 2))
    options: dict[str, Any] = {}
    if mode in ("P", "RGB"):
        flat = Image.new("RGB", (4, 2), (255, 0, 0))
        flat.paste((0, 0, 0), (0, 0, 2, 2))
        layers = flat if mode == "RGB" else flat.quantize(2)
        options["transparency"] = (255, 0, 0) if mode == "RGB" else int(np.asarray(layers)[0, 3])
    elif mode == "LA":
        layers = layers.convert("LA")
    found = decoded(layers, tmp_path / ("x.tif" if mode == "PA" else "x.png"), **options)
    assert found[:, :2].max() == 0
    assert found[:, 2:].min() == 255


@pytest.mark.parametrize(("mode", "colour"), [("1", 1), ("CMYK", (0, 0, 0, 0)), ("YCbCr", (255, 128, 128)), ("L", 255), ("P", 0)])
def test_other_modes_keep_their_colour(mode: str, colour: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (3, 3), colour)
    if mode == "P":
        image.putpalette([255, 255, 255])
    assert decoded(image, tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")).min() == 255


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(str(tmp_path / "x.jpg")).size == (4, 8)


def test_suffixes_are_those_that_can_be_decoded() -> None:
    assert {".jpg", ".jfif", ".pgm", ".jp2", ".png", ".webp", ".tif", ".mpo"} <= image_suffixes()
    assert not {".pdf", ".mpg", ".h5", ".txt", ""} & image_suffixes()


@pytest.mark.parametrize("size", [(40, 60), (61, 33), (32, 32), (300, 500)])
def test_the_middle_is_torchvisions(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = transforms.CenterCrop(28)(transforms.Resize(32)(image))
    assert np.array_equal(np.asarray(resize_and_crop(image, resize=32, crop=28)), np.asarray(expected))


def test_an_image_of_the_size_stays_as_it_is() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))
    assert resize_and_crop(image, resize=32, crop=28) is image
