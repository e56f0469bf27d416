"""Data sources: which images there are, which are held out, and how one is read; and where a VAE lies.

The split and every smaller subset go by a hash of the image's name, class by class: the same images on any machine,
whatever the order of a listing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from specs.data import Data, DigitsData, ImageFolderData

if TYPE_CHECKING:
    import numpy as np

# Known without reading them, so that a plan needs no scikit-learn; a test compares with the file.
DIGITS_PER_CLASS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class Item:
    """One image: its name within the source, and its class."""

    name: str
    label: int


def class_folders(data: ImageFolderData) -> dict[str, list[str]]:
    """The images of each class folder, by name; folders without images do not count."""
    found = {}
    for folder in sorted(path for path in Path(data.path).iterdir() if path.is_dir()):
        names = [path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        if names:
            found[folder.name] = names
    return found


def class_sizes(data: Data) -> tuple[int, ...]:
    """Images in each class."""
    if isinstance(data, DigitsData):
        return DIGITS_PER_CLASS
    return tuple(len(names) for names in class_folders(data).values())


def training_size(data: Data) -> int:
    """Images that are not held out."""
    return sum(size - heldout_of(size, data.heldout) for size in class_sizes(data))


def heldout_of(size: int, share: float) -> int:
    """How many of a class are held out: at least one stays on each side, where there are two."""
    return min(max(round(size * share), 1), size - 1) if size > 1 else 0


def items(data: Data) -> list[Item]:
    """Every image of the source."""
    if isinstance(data, DigitsData):
        return [Item(str(index), int(label)) for index, label in enumerate(_digits()[1])]
    folders = class_folders(data).items()
    return [Item(f"{folder}/{name}", label) for label, (folder, names) in enumerate(folders) for name in names]


def split(data: Data) -> tuple[list[Item], list[Item]]:
    """Training and held-out images, each in an order in which every prefix is a stratified subset."""
    training, heldout = [], []
    by_class: dict[int, list[Item]] = {}
    for item in items(data):
        by_class.setdefault(item.label, []).append(item)
    for members in by_class.values():
        members.sort(key=lambda item: hashlib.sha256(item.name.encode()).digest())
        cut = heldout_of(len(members), data.heldout)
        heldout.append(members[:cut])
        training.append(members[cut:])
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
    """(C,S,S) float32 in [-1, 1]; raises ValueError, naming the file, where it is no image."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if isinstance(data, DigitsData):
        digit = Image.fromarray(_digits()[0][int(name)].astype(np.float32) / 8 - 1)
        size = (data.image_size, data.image_size)
        return np.asarray(digit.resize(size, Image.Resampling.BILINEAR))[None]

    path = Path(data.path) / name
    try:
        picture = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None
    side = data.image_size
    scaled = [max(side, round(length * side / min(picture.size))) for length in picture.size]
    picture = picture.resize((scaled[0], scaled[1]), Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32)
    return (pixels / 127.5 - 1).transpose(2, 0, 1)


def vae_folder(place: Path) -> Path:
    """Where in a folder a VAE lies: in itself, or in the `vae` of a saved pipeline."""
    within = place / "vae"
    return within if (within / "config.json").is_file() and not (place / "config.json").is_file() else place


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target
