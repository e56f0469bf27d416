"""DINO by transformers: unit vectors of images, near to each other where the images are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftwork.stages.evaluation.pretrained import load_model, model_name, read_pretrained

if TYPE_CHECKING:
    from PIL import Image


class Dino:
    """DINO, loaded on a device.

    path: a folder or hub id with an image processor, such as facebook/dinov2-base. Raise SpecError in one line if it
    cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, ViTModel

        self.name = model_name(path)
        self.device = device
        config = read_pretrained(lambda: AutoConfig.from_pretrained(path, trust_remote_code=False), path)
        if config.model_type == "vit":  # the first DINO, whose files have no layer behind the class token
            self.model = load_model(ViTModel, path, device, add_pooling_layer=False)
        else:
            self.model = load_model(AutoModel, path, device, trust_remote_code=False)
        # Pillow makes images smaller, as for CLIP; for DINOv3, whose processor does not know it, torchvision does.
        self.processor = read_pretrained(
            lambda: AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False), path
        )

    @torch.no_grad()
    def class_tokens(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the class token (n,D) of RGB images, after the last norm."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        tokens: Tensor = self.model(pixel_values=pixels).last_hidden_state
        return tokens[:, 0]

    def image_vectors(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the unit vectors (n,D) of RGB images: their class tokens."""
        return F.normalize(self.class_tokens(images), dim=-1)
