"""Types for argparse."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: an int or a finite float in [low, high]."""

    def parse(text: str) -> float:
        bounds = f"a {'whole ' if kind is int else ''}number " + (f"of at least {low}" if high == math.inf else f"from {low} to {high}")
        try:
            value: float = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {bounds}") from None
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return parse
