"""Twelve classes of drawn photos: a shape of random place, size, angle and colour on a noisy background. Stands for a small image folder of one's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COUNTS = (160, 110, 80, 60, 50, 40, 30, 25, 18, 12, 9, 6)  # training images of each class, 600 in all
_SIDE = 128  # pixels
_Point = tuple[float, float]
_Outline = Callable[[float], list[list[_Point]]]  # polygons of a shape of radius 1, turned by an angle


def _polygon(corners: int, *radii: float) -> _Outline:
    """Corners at equal angles; their distances from the centre repeat `radii`."""

    def outline(angle: float) -> list[list[_Point]]:
        turns = [angle + 2 * math.pi * corner / corners for corner in range(corners)]
        return [[(radii[place % len(radii)] * math.cos(turn), radii[place % len(radii)] * math.sin(turn)) for place, turn in enumerate(turns)]]

    return outline


def _bars(*bars: tuple[float, float, float, float]) -> _Outline:
    """Rectangles (left, top, right, bottom), turned about the centre."""

    def outline(angle: float) -> list[list[_Point]]:
        cosine, sine = math.cos(angle), math.sin(angle)
        corners = [((left, top), (right, top), (right, bottom), (left, bottom)) for left, top, right, bottom in bars]
        return [[(x * cosine - y * sine, x * sine + y * cosine) for x, y in rectangle] for rectangle in corners]

    return outline


SHAPES: dict[str, _Outline] = {
    "circle": _polygon(40, 1.0),
    "square": _polygon(4, 1.0),
    "triangle": _polygon(3, 1.0),
    "star": _polygon(10, 1.0, 0.45),
    "bar": _bars((-1.0, -0.2, 1.0, 0.2)),
    "cross": _bars((-1.0, -0.25, 1.0, 0.25), (-0.25, -1.0, 0.25, 1.0)),
    "stripes": _bars(*((-0.8, at - 0.12, 0.8, at + 0.12) for at in (-0.7, 0.0, 0.7))),
    "dots": _bars(*((x - 0.2, y - 0.2, x + 0.2, y + 0.2) for x in (-0.6, 0.0, 0.6) for y in (-0.6, 0.0, 0.6))),
    "hexagon": _polygon(6, 1.0),
    "corner": _bars((-0.8, -0.8, -0.3, 0.8), (-0.8, 0.3, 0.8, 0.8)),
    "gate": _bars((-0.8, -0.8, -0.4, 0.8), (0.4, -0.8, 0.8, 0.8), (-0.8, -0.8, 0.8, -0.4)),
    "gear": _polygon(16, 1.0, 0.7),
}


def draw_photo(shape: str, random: np.random.Generator) -> Image.Image:
    """One photo of a shape."""
    background = random.integers(60, 200, 3)
    noise = np.clip(random.normal(background, 18, (_SIDE // 4, _SIDE // 4, 3)), 0, 255).astype(np.uint8)
    photo = Image.fromarray(noise).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    red, green, blue = ((background + 128 + random.integers(-40, 41, 3)) % 256).tolist()
    radius = _SIDE * random.uniform(0.2, 0.42)
    across, down = random.uniform(radius, _SIDE - radius, 2)
    pencil = ImageDraw.Draw(photo)
    for polygon in SHAPES[shape](random.uniform(0, 2 * math.pi)):
        pencil.polygon([(across + radius * x, down + radius * y) for x, y in polygon], fill=(red, green, blue))
    return photo.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.5)))


def draw_photos(counts: tuple[int, ...], seed: int) -> Iterator[tuple[str, Image.Image]]:
    """As many photos of each class as `counts` says, with the class's name; one seed gives the same photos."""
    random = np.random.default_rng(seed)
    for shape, count in zip(SHAPES, counts, strict=True):
        for _ in range(count):
            yield shape, draw_photo(shape, random)
