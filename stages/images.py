"""Images: how one is read, and what is said of those that cannot be.

This file is read before a job starts, so it is light: Pillow and NumPy load with the first image.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.specs.data import Data, DigitsData
from graftwork.specs.problems import plain, text

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # that a file of these names may be in; none runs a program
MOST_PIXELS = 2**26  # of an image after it is scaled, before the crop: a line of pixels would become a wall
SHOWN = 10  # broken images that an error names


class BrokenImage(ValueError):
    """A file that cannot be read as an image; the message is one line that names it."""


def read_image(data: Data, name: str) -> np.ndarray:
    """(C,S,S) float32 in [-1, 1]; raises BrokenImage."""
    return scaled(read_pixels(data, name))


def scaled(pixels: np.ndarray) -> np.ndarray:
    """What `read_pixels` gives, as float32 in [-1, 1]."""
    return pixels.astype("float32") / 127.5 - 1 if pixels.dtype == "uint8" else pixels


def read_pixels(data: Data, name: str) -> np.ndarray:
    """(C,S,S) as it is cheap to send: uint8, 0 .. 255, or (digits) float32 in [-1, 1]; raises BrokenImage."""
    import numpy as np
    from PIL import Image

    side = data.image_size
    if isinstance(data, DigitsData):
        digit = Image.fromarray(digits()[0][int(name)].astype(np.float32) / 8 - 1)
        return np.asarray(digit.resize((side, side), Image.Resampling.BILINEAR))[None]

    path = Path(data.path) / name
    try:
        picture = _opened(path)
        scaled = [max(side, round(length * side / min(picture.size))) for length in picture.size]
        if scaled[0] * scaled[1] > MOST_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels, too long for an image")
        picture = picture.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    except Exception as error:  # torn files make the library raise whatever their bytes happen to stand for
        reason = plain(str(error)).replace(repr(str(path)), "it") or type(error).__name__
        raise BrokenImage(f"{plain(text(str(path)))}: cannot be read as an image: {reason}") from None
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return np.asarray(picture.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def _opened(path: Path) -> Image.Image:
    """An image's first frame in RGB: transparency is dropped, 16 bits of grey become 8."""
    import numpy as np
    from PIL import Image

    if not path.is_file():  # a pipe would never end
        raise ValueError("no file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=FORMATS) as picture:
            if picture.mode.startswith("I"):  # PIL would cut what is above 255 off
                return Image.fromarray((np.asarray(picture, np.float32) / 257).astype(np.uint8)).convert("RGB")
            return picture.convert("RGB")


def broken_images(data: Data, names: Iterable[str]) -> dict[str, str]:
    """Which of these images cannot be read, with what is said of each."""
    found = {}
    for name in names:
        try:
            read_image(data, name)
        except BrokenImage as error:
            found[name] = str(error)
    return found


def told(problems: Collection[str], total: int) -> str:
    """One line about broken images: how many there are, and the first of them."""
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} of {total} images are broken: {'; '.join(sorted(problems)[:SHOWN])}{more}"


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits' pixels (n,8,8), 0 .. 16, and their labels (n,)."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return loaded.images, loaded.target
