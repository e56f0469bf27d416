"""CLIP by transformers: unit vectors of images and of texts, near to each other where they mean the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.specs.problems import SpecError
from graftwork.stages.evaluation.pretrained import load_model, model_name, read_pretrained

if TYPE_CHECKING:
    from PIL import Image


class Clip:
    """CLIP, loaded on a device.

    path: a folder or hub id with a tokenizer and an image processor, such as openai/clip-vit-large-patch14. Raise
    SpecError in one line if it cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.name = model_name(path)
        self.device = device
        self.model = load_model(CLIPModel, path, device)
        self.tokenizer = read_pretrained(lambda: CLIPTokenizer.from_pretrained(path), path)
        _require_whole_tokenizer(len(self.tokenizer), self.model.config.text_config.vocab_size, path)
        # Pillow's bicubic, with which OpenAI's code makes images smaller.
        self.processor = read_pretrained(lambda: CLIPImageProcessorPil.from_pretrained(path), path)

    @torch.no_grad()
    def image_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the unit vectors (n,D) of RGB images."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    @torch.no_grad()
    def text_vectors(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors (n,D) of texts; one of more tokens than the model reads, 77 in OpenAI's, is cut."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        return F.normalize(self.model.get_text_features(**tokens.to(self.device)).pooler_output, dim=-1)


def _require_whole_tokenizer(num_tokens: int, num_embeddings: int, path: str) -> None:
    """Raise SpecError if they differ: without its files, transformers makes a tokenizer that knows no letter."""
    if num_tokens != num_embeddings:
        accepted = f"the model's of {num_embeddings:,}, in tokenizer.json or vocab.json and merges.txt"
        raise SpecError([f"{path}: got a tokenizer of {num_tokens:,} tokens; accepted: {accepted}"])
