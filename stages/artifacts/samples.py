"""The samples of a row, in the artifact of `evaluate/<row>`: as `evaluate.keep_samples` leaves them.

samples.npy   (n,C,S,S) uint8, decoded by the codec; memory-mapped when it is read
labels.npy    (n,) int64, the class, prompt or caption that each is of, counted from 0
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

SAMPLES, LABELS = "samples.npy", "labels.npy"


def read_samples(folder: Path) -> Iterator[tuple[int, Image.Image]]:
    """Yield the label and the image of each sample that an artifact keeps, in their order."""
    images, labels = np.load(folder / SAMPLES, mmap_mode="r"), np.load(folder / LABELS)
    for pixels, label in zip(images, labels.tolist(), strict=True):
        yield label, as_picture(pixels)


def as_picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an RGB image of levels 0 .. 255 (3,H,W), or (1,H,W) of grey."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0)))
