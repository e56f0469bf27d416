"""Scenes of plain shapes in GenEval's own grammar: drawn, named, and found again by rules, without a network.

A scene is a grey square of SIDE pixels with four slots, two by two; a slot holds one shape in one colour. The detector
finds connected pixels of one colour and compares them with each shape: on a drawn scene it is always right, on a
sample it is as sure as the pixels fit.

Shapes: S pixels a side of a scene, K pixels a side of a shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from graftwork.specs.detector import ShapesSpec
from graftwork.stages.evaluation.geneval.rules import DetectedObject
from graftwork.stages.evaluation.geneval.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

SIDE = ShapesSpec.side  # S
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
BACKGROUND = (128, 128, 128)
SHAPES = {
    "square": ("######", "######", "######", "######", "######", "######"),
    "cross": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
    "triangle": ("..##..", "..##..", ".####.", ".####.", "######", "######"),
    "ring": ("######", "######", "##..##", "##..##", "######", "######"),
}
SLOTS = ((1, 1), (9, 1), (1, 9), (9, 9))  # left and top of each
VOCABULARY = Vocabulary(classes=tuple(SHAPES), colours=tuple(COLOURS))
MIN_PIXELS = 8  # of an object
_PALETTE = np.array([BACKGROUND, *COLOURS.values()], np.int64)


@dataclass(frozen=True)
class Shape:
    """A shape of a scene: its class, its colour, and the number of its slot."""

    name: str
    colour: str
    slot: int


def template(name: str) -> NDArray[np.bool_]:
    """Return the pixels (K,K) of a shape."""
    return np.array([[sign == "#" for sign in row] for row in SHAPES[name]])


def drawn(shapes: Iterable[Shape]) -> NDArray[np.uint8]:
    """Return the scene (S,S,3)."""
    scene = np.full((SIDE, SIDE, 3), BACKGROUND, np.uint8)
    for shape in shapes:
        mask, (left, top) = template(shape.name), SLOTS[shape.slot]
        scene[top : top + len(mask), left : left + len(mask)][mask] = COLOURS[shape.colour]
    return scene


class ShapesDetector:
    """Finds the shapes of a scene, and their colours."""

    name = "shapes"
    vocabulary = VOCABULARY

    def detect(self, image: Image.Image) -> dict[str, list[DetectedObject]]:
        """Return the objects of an image, by class; no class without any."""
        colours = nearest_colours(image)
        objects: dict[str, list[DetectedObject]] = {}
        for colour in range(1, len(_PALETTE)):
            for mask in _connected(colours == colour):
                name, found = _recognised(mask)
                objects.setdefault(name, []).append(found)
        return {name: objects[name] for name in SHAPES if name in objects}

    def classify(self, image: Image.Image, class_name: str, objects: Sequence[DetectedObject]) -> list[str]:
        """Return the colour of each object: the one that most of its pixels are nearest to."""
        colours, names = nearest_colours(image), list(COLOURS)
        counts = [np.bincount(colours[found.mask], minlength=len(_PALETTE)) for found in objects]
        return [names[int(count[1:].argmax())] for count in counts]


def nearest_colours(image: Image.Image) -> NDArray[np.int64]:
    """Return for each pixel (S,S) the colour that it is nearest to, by its number; 0 is the background."""
    pixels = np.asarray(image.convert("RGB"), np.int64)
    distances = ((pixels[..., None, :] - _PALETTE) ** 2).sum(-1)
    return np.asarray(distances.argmin(-1))


def _connected(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return the parts (S,S) of a mask whose pixels touch, at sides or corners, and that are large enough."""
    from scipy import ndimage

    numbers, count = ndimage.label(mask, structure=np.ones((3, 3)))
    parts = [numbers == number for number in range(1, count + 1)]
    return [part for part in parts if part.sum() >= MIN_PIXELS]


def _recognised(mask: NDArray[np.bool_]) -> tuple[str, DetectedObject]:
    """Return the shape that the pixels of an object fit best, and how well: the share that both have."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    middle = (round((box[0] + box[2]) / 2), round((box[1] + box[3]) / 2))
    scores = {name: _overlap(mask, template(name), middle) for name in SHAPES}
    best = max(scores, key=lambda name: scores[name])
    return best, DetectedObject(scores[best], box, mask)


def _overlap(mask: NDArray[np.bool_], shape: NDArray[np.bool_], middle: tuple[int, int]) -> float:
    """Return the pixels that an object and a shape with its middle there share, over those that either has."""
    size, (x, y) = len(shape), middle
    padded = np.pad(mask, size)
    placed = np.zeros_like(padded)
    left, top = x + size - size // 2, y + size - size // 2
    placed[top : top + size, left : left + size] = shape
    return float((padded & placed).sum() / (padded | placed).sum())
