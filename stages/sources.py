"""Data sources: which images there are, which are held out, and how one is read; and where a VAE lies.

The split and every smaller subset go by a hash of the image's name, class by class: the same images on any machine,
whatever the order of a listing.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from graftwork.specs.data import Data, DigitsData, ImageFolderData
from graftwork.specs.problems import plain

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Known without reading them, so that a plan needs no scikit-learn; a test compares with the file.
DIGITS_PER_CLASS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # that a file of these names may be in; none runs a program
MOST_PIXELS = 2**26  # of an image after it is scaled, before the crop: a line of pixels would become a wall
SHOWN = 10  # broken images that an error names


@dataclass(frozen=True)
class Item:
    """One image: its name within the source, and its class."""

    name: str
    label: int


class BrokenImage(ValueError):
    """A file that cannot be read as an image; the message is one line that names it."""


def class_folders(data: ImageFolderData) -> dict[str, list[str]]:
    """The images of each class folder, by name; nothing that is hidden counts.

    Names are as the file system has them: what is not UTF-8 in them is escaped, see `text`.
    """
    return {folder.name: [path.name for path in _visible(folder) if _is_image(path)] for folder in _folders(data)}


def text(name: str) -> str:
    """A file's name as text: bytes of it that are not UTF-8 are spelt out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folders(data: ImageFolderData) -> list[Path]:
    return [path for path in _visible(Path(data.path)) if path.is_dir()]


def _visible(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def class_sizes(data: Data) -> tuple[int, ...]:
    """Images in each class; which of them are broken shows only when they are read."""
    if isinstance(data, DigitsData):
        return DIGITS_PER_CLASS
    return tuple(len(names) for names in class_folders(data).values())


def class_names(data: Data) -> tuple[str, ...]:
    """What the classes are called, in the order of their numbers."""
    if isinstance(data, DigitsData):
        return tuple(map(str, range(data.classes)))
    return tuple(map(text, class_folders(data)))


def split_sizes(data: Data) -> tuple[int, int]:
    """How many images `split` finds to train on and to hold out, before any is read."""
    sizes = class_sizes(data)
    heldout = [heldout_of(size, data.heldout) for size in sizes]
    training = [size - held for size, held in zip(sizes, heldout, strict=True)]
    return sum(min(size, data.per_class or size) for size in training), sum(heldout)


def scarce(data: Data, sizes: Sequence[int]) -> str | None:
    """A line about the class of the fewest images, where `data.per_class` asks for more of each.

    sizes: of each class, the images that are there, held out or not.
    """
    training = [size - heldout_of(size, data.heldout) for size in sizes]
    if data.per_class is None or not training or data.per_class <= min(training):
        return None
    name = class_names(data)[training.index(min(training))]
    accepted = f"at most {min(training)}, the training images of the class {plain(name)}"
    return f"data.per_class: got {data.per_class}; accepted: {accepted}"


def heldout_of(size: int, share: float) -> int:
    """How many of a class are held out: at least one stays on each side, where there are two."""
    return min(max(round(size * share), 1), size - 1) if size > 1 else 0


def items(data: Data) -> list[Item]:
    """Every image of the source."""
    if isinstance(data, DigitsData):
        return [Item(str(index), int(label)) for index, label in enumerate(_digits()[1])]
    folders = class_folders(data).items()
    return [Item(f"{folder}/{name}", label) for label, (folder, names) in enumerate(folders) for name in names]


def split(data: Data, without: Collection[str] = ()) -> tuple[list[Item], list[Item]]:
    """Training and held-out images, each in an order in which every prefix is a stratified subset.

    Of a class, `data.per_class` images are kept to train on; that is known before any image is read.

    without: names of images that are left out, as if they were not there.
    """
    training, heldout = [], []
    by_class: dict[int, list[Item]] = {}
    for item in items(data):
        if item.name not in without:
            by_class.setdefault(item.label, []).append(item)
    for members in by_class.values():
        members.sort(key=lambda item: hashlib.sha256(os.fsencode(item.name)).digest())
        cut = heldout_of(len(members), data.heldout)
        heldout.append(members[:cut])
        training.append(members[cut:][: data.per_class])
    return interleave(training), interleave(heldout)


def interleave(classes: Sequence[Sequence[Item]]) -> list[Item]:
    """One of each class in turn, until all are used: item i of a class with n comes at (i + 1/2) / n."""
    placed = [
        ((position + 0.5) / len(members), item.label, item)
        for members in classes
        for position, item in enumerate(members)
    ]
    return [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])]


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
        digit = Image.fromarray(_digits()[0][int(name)].astype(np.float32) / 8 - 1)
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


def vae_folder(place: Path) -> Path:
    """Where in a folder a VAE lies: in itself, or in the `vae` of a saved pipeline."""
    within = place / "vae"
    return within if (within / "config.json").is_file() and not (place / "config.json").is_file() else place


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
