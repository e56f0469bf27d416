"""Data sources: which images there are, and which are held out.

The split and every smaller subset go by a hash of the image's name, class by class: the same images on any machine,
whatever the order of a listing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from graftwork.specs.data import (
    TEXT_DATA,
    CaptionsData,
    Data,
    DataFiles,
    DigitsData,
    ImageFolderData,
    SyntheticData,
)
from graftwork.specs.figures import counted
from graftwork.specs.problems import plain, text
from graftwork.stages.data.captions import read_captions
from graftwork.stages.data.images import digits
from graftwork.stages.data.listing import list_images, order_lines
from graftwork.stages.data.prompts import read_prompts
from graftwork.stages.data.shards import shards_at
from graftwork.stages.data.tars import Span

# Known without reading them, so that a plan needs no scikit-learn; a test compares with the file.
DIGITS_PER_CLASS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)

MIN_HELDOUT = 2  # images: a distance needs their covariance
MAX_LABELS = 12  # classes that a line shows


@dataclass(frozen=True)
class Item:
    """One image: its name within the source, the number of its class or of its caption, and its place in a tar."""

    name: str
    label: int
    span: Span | None = None  # of an image in a file of its own


def class_folders(data: ImageFolderData) -> dict[str, list[str]]:
    """Return the images of each class folder, by their path below it, in the order of the labels."""
    return {folder.name: folder.images for folder in list_images(data).folders}


def class_sizes(data: Data) -> tuple[int, ...]:
    """Images in each class, or in all where they have captions; which of them are broken shows when they are read."""
    if isinstance(data, DigitsData):
        return DIGITS_PER_CLASS
    if isinstance(data, CaptionsData):
        return (len(read_captions(data).by_image),)
    if isinstance(data, SyntheticData):
        return (data.samples,)
    return tuple(len(names) for names in class_folders(data).values())


def class_names(data: Data) -> tuple[str, ...]:
    """What the classes are called, in the order of their numbers; or the captions."""
    if isinstance(data, DigitsData):
        return tuple(map(str, range(data.classes)))
    if isinstance(data, CaptionsData):
        return read_captions(data).different()
    if isinstance(data, SyntheticData):
        return different_prompts(data)
    return tuple(map(text, class_folders(data)))


def labels_line(data: Data) -> str | None:
    """Return a line with the label of each class folder, or of the first and the last; one that counts captions; None
    if the data are elsewhere."""
    if isinstance(data, DigitsData) or not are_here(data):
        return None
    if isinstance(data, CaptionsData):
        return read_captions(data).line()
    if isinstance(data, SyntheticData):
        prompts = counted(len(different_prompts(data)), "prompt")
        return f"{data.samples:,} samples of {prompts}, drawn by the rootstock"
    named = [f"{label} {plain(name)}" for label, name in enumerate(class_names(data))]
    numbers = all(name.isascii() and name.isdigit() for name in class_folders(data))
    order = f"as {plain(data.classes)} says" if isinstance(data.classes, str) else "by number" if numbers else "by name"
    some = named if len(named) <= MAX_LABELS else [*named[: MAX_LABELS - 1], "..", named[-1]]
    return f"{len(named):,} classes, {order}: {', '.join(some)}"


def num_classes(data: Data) -> int | None:
    """Return how many classes or captions there are; None if that is in data, or in a file, that are elsewhere."""
    if isinstance(data.classes, int):
        return data.classes
    if isinstance(data.classes, str) and Path(data.classes).is_file():
        return len(order_lines(data.classes))
    return len(class_names(data)) if are_here(data) else None


def are_here(data: Data) -> bool:
    """Whether the data's files are on this machine."""
    if isinstance(data, SyntheticData):
        return Path(data.prompts).is_file()
    if isinstance(data, DigitsData) or Path(data.path).is_dir():
        return True
    return isinstance(data, CaptionsData) and bool(shards_at(data.path))


def different_prompts(data: SyntheticData) -> tuple[str, ...]:
    """Return the prompts that samples are drawn of, each once, in the order of the file. Raise ValueError."""
    return tuple(dict.fromkeys(read_prompts(data.prompts, "data.prompts")))[: data.samples]


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


def identity(data: DataFiles) -> tuple[str, ...]:
    """Return what a key has of the data beside what the images hold: class folders, or each image with its caption."""
    if isinstance(data, CaptionsData):
        return tuple(f"{name}\0{caption}" for name, caption in read_captions(data).by_image.items())
    assert isinstance(data, ImageFolderData)
    return tuple(class_folders(data))


def items(data: Data) -> list[Item]:
    """Every image of the source."""
    if isinstance(data, DigitsData):
        return [Item(str(index), int(label)) for index, label in enumerate(digits()[1])]
    if isinstance(data, CaptionsData):
        captions = read_captions(data)
        labels = {caption: label for label, caption in enumerate(captions.different())}
        return [Item(name, labels[caption], captions.spans.get(name)) for name, caption in captions.by_image.items()]
    if isinstance(data, SyntheticData):
        count = len(different_prompts(data))
        return [Item(f"{number:08d}", number % count) for number in range(data.samples)]
    folders = class_folders(data).items()
    return [Item(f"{folder}/{name}", label) for label, (folder, names) in enumerate(folders) for name in sorted(names)]


def split(data: Data, without: Collection[str] = ()) -> tuple[list[Item], list[Item]]:
    """Training and held-out images, each in an order in which every prefix is a stratified subset.

    Of a class, `data.per_class` images are kept to train on; that is known before any image is read. Images with
    captions are of no class, and in random order.

    without: names of images that are left out, as if they were not there.
    """
    training, heldout = [], []
    by_class: dict[int, list[Item]] = {}
    for item in items(data):
        if item.name not in without:
            by_class.setdefault(0 if isinstance(data, TEXT_DATA) else item.label, []).append(item)
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
