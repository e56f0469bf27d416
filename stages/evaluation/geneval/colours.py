"""The colour of an object by CLIP, zero-shot, as GenEval's scorer asks it (ViT-L/14 of OpenAI), by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.specs.problems import SpecError
from graftwork.stages.evaluation.geneval.pretrained import load_model, model_name, read_pretrained
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


class ClipColourClassifier:
    """CLIP, loaded on a device, and the texts of the classes that it was asked about.

    path: a folder or hub id with a tokenizer and an image processor, such as openai/clip-vit-large-patch14. Raise
    SpecError in one line if it cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device, colours: Sequence[str] = GENEVAL.colours) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.name = model_name(path)
        self.device = device
        self.colours = tuple(colours)
        self.model = load_model(CLIPModel, path, device)
        self.tokenizer = read_pretrained(lambda: CLIPTokenizer.from_pretrained(path), path)
        _require_whole_tokenizer(len(self.tokenizer), self.model.config.text_config.vocab_size, path)
        # Pillow's bicubic, with which the published scorer makes crops smaller.
        self.processor = read_pretrained(lambda: CLIPImageProcessorPil.from_pretrained(path), path)
        self._text_features: dict[str, Tensor] = {}

    @torch.no_grad()
    def classify(self, image: Image.Image, class_name: str, objects: Sequence[DetectedObject]) -> list[str]:
        """Return the colour of each object of a class in an RGB image: the one whose text is nearest to its crop."""
        crops = [object_crop(image, instance) for instance in objects]
        pixels = self.processor(images=crops, return_tensors="pt")["pixel_values"].to(self.device)
        features = F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        nearest = (features @ self.text_features(class_name).T).argmax(-1)
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
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            features = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
            means = features.unflatten(0, (len(self.colours), len(COLOUR_TEMPLATES))).mean(1)
            self._text_features[class_name] = F.normalize(means, dim=-1)
        return self._text_features[class_name]


def _require_whole_tokenizer(num_tokens: int, num_embeddings: int, path: str) -> None:
    """Raise SpecError if they differ: without its files, transformers makes a tokenizer that knows no letter."""
    if num_tokens != num_embeddings:
        accepted = f"the model's of {num_embeddings:,}, in tokenizer.json or vocab.json and merges.txt"
        raise SpecError([f"{path}: got a tokenizer of {num_tokens:,} tokens; accepted: {accepted}"])


def object_crop(image: Image.Image, instance: DetectedObject) -> Image.Image:
    """Return an object cut to its box, on grey if it has a mask."""
    from PIL import Image

    if instance.mask is not None:
        background = Image.new("RGB", image.size, BACKGROUND_COLOUR)
        image = Image.composite(image, background, Image.fromarray(instance.mask))
    return image.crop(instance.box)
