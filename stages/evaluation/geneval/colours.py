"""The colour of an object by CLIP, zero-shot, as GenEval's scorer asks it (ViT-L/14 of OpenAI)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.stages.evaluation.clip import Clip
from graftwork.stages.evaluation.geneval.rules import DetectedObject
from graftwork.stages.evaluation.geneval.vocabulary import GENEVAL

if TYPE_CHECKING:
    from PIL import Image

COLOUR_TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
BACKGROUND_COLOUR = "#999"  # of pixels outside an object's mask


class ClipColourClassifier(Clip):
    """CLIP, loaded on a device, and the texts of the classes that it was asked about."""

    def __init__(self, path: str, device: torch.device, colours: Sequence[str] = GENEVAL.colours) -> None:
        super().__init__(path, device)
        self.colours = tuple(colours)
        self._text_features: dict[str, Tensor] = {}

    @torch.no_grad()
    def classify(self, image: Image.Image, class_name: str, objects: Sequence[DetectedObject]) -> list[str]:
        """Return the colour of each object of a class in an RGB image: the one whose text is nearest to its crop."""
        crops = [object_crop(image, instance) for instance in objects]
        nearest = (self.image_vectors(crops) @ self.text_features(class_name).T).argmax(-1)
        return [self.colours[index] for index in nearest.tolist()]

    @torch.no_grad()
    def text_features(self, class_name: str) -> Tensor:
        """Return the direction of each colour's texts (K,D): the mean over the templates of their unit vectors."""
        if class_name not in self._text_features:
            texts = [
                template.format(colour=colour, name=class_name)
                for colour in self.colours
                for template in COLOUR_TEMPLATES
            ]
            means = self.text_vectors(texts).unflatten(0, (len(self.colours), len(COLOUR_TEMPLATES))).mean(1)
            self._text_features[class_name] = F.normalize(means, dim=-1)
        return self._text_features[class_name]


def object_crop(image: Image.Image, instance: DetectedObject) -> Image.Image:
    """Return an object cut to its box, on grey if it has a mask."""
    from PIL import Image

    if instance.mask is not None:
        background = Image.new("RGB", image.size, BACKGROUND_COLOUR)
        image = Image.composite(image, background, Image.fromarray(instance.mask))
    return image.crop(instance.box)
