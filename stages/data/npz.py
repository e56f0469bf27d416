"""Files of other people's arrays, `.npz`: what one holds, by its headers, and the images in it, some at a time.

Light, since a plan reads them: numpy loads with the first header.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STATISTICS = frozenset({"mu", "sigma", "mu_s", "sigma_s"})  # of features, as published references have them
IMAGES = "arr_0"  # as numpy.savez calls an array without a name, and as the ADM suite's files have their images
MAX_SIDE = 2**14  # pixels


@dataclass(frozen=True)
class NpzImages:
    """The images of a file: `arr_0`, (n,H,W,3) uint8. They are read as they are asked for."""

    path: str
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, size: int) -> Iterator[NDArray[np.uint8]]:
        """Yield images (at most size,3,H,W), in their order. Raise ValueError if the file ends before they do."""
        import numpy as np

        count, *image = self.shape
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
            _read_header(member)
            for start in range(0, count, size):
                part = min(size, count - start)
                try:
                    read = member.read(part * math.prod(image))
                    images = np.frombuffer(read, np.uint8).reshape(part, *image)
                except Exception as error:  # torn files make zlib raise whatever their bytes happen to stand for
                    raise ValueError(f"{self.path}: {IMAGES} cannot be read ({type(error).__name__})") from None
                yield np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def npz_names(path: str | Path) -> frozenset[str]:
    """Return the names of the arrays in a file; raise ValueError if it is not an .npz."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise ValueError(f"{path}: cannot be read as an .npz ({type(error).__name__})") from None


def holds_images(path: str) -> bool:
    """Return whether the statistics of a reference are those of its images: it is a folder, or a file without any.

    False for what is not there, or is not an .npz.
    """
    if Path(path).is_dir():
        return True
    try:
        names = npz_names(path)
    except ValueError:
        return False
    return IMAGES in names and not names & STATISTICS


def npz_images(path: str) -> NpzImages:
    """Return the images of a file, of which only the header is read; raise ValueError if it has none of that form."""
    accepted = f"accepted: {IMAGES} of images (n,H,W,3), uint8"
    if IMAGES not in npz_names(path):
        raise ValueError(f"{path} without {IMAGES}; {accepted}")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
            shape, is_fortran, dtype = _read_header(member)
            offset = member.tell()
            size = archive.getinfo(f"{IMAGES}.npy").file_size
    except Exception as error:  # see `batches`
        raise ValueError(f"{path}: {IMAGES} cannot be read ({type(error).__name__})") from None
    fits = len(shape) == 4 and shape[3] == 3 and min(shape) > 0 and max(shape[1:3]) <= MAX_SIDE
    if not fits or dtype != "uint8" or is_fortran:
        order = ", in Fortran's order" if is_fortran else ""
        raise ValueError(f"{path} with {IMAGES} {shape} of {dtype}{order}; {accepted}")
    if size != offset + math.prod(shape):
        raise ValueError(f"{path} with {IMAGES} {shape}, of which {size - offset:,} bytes are there; {accepted}")
    count, height, width, channels = shape
    return NpzImages(path, (count, height, width, channels))


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Return shape, order and dtype; the array's bytes come next."""
    from numpy.lib import format as npy

    major, _ = npy.read_magic(member)
    read = npy.read_array_header_1_0 if major == 1 else npy.read_array_header_2_0
    return read(member)
