"""The two scales of pixels: levels 0 .. 255, as files and metrics have them, and -1 .. 1, as codecs and models do."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Values = TypeVar("Values", "NDArray[np.float32]", "Tensor")

HALF = 127.5  # levels


def scaled_levels(levels: Values) -> Values:
    """Return levels 0 .. 255 as -1 .. 1."""
    return levels / HALF - 1


def levels_of(pixels: Values) -> Values:
    """Return -1 .. 1 as levels 0.5 .. 255.5, to be clamped and cut to whole ones."""
    return pixels * HALF + (HALF + 0.5)


def before_rounding(levels: Values) -> Values:
    """Return what `levels_of` had, of levels that were cut to whole ones; half a level lower than `scaled_levels`."""
    return (levels - (HALF + 0.5)) / HALF
