"""A tiny CLIP with random weights, in the files that openai/clip-vit-large-patch14 has, and direct computations."""

from __future__ import annotations

import json
import string
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
CLIP_MEAN, CLIP_DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# As published with openai/clip-vit-large-patch14, but for the side.
PREPROCESSOR = {
    "crop_size": SIDE,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_DEVIATION,
    "resample": 3,
    "size": SIDE,
}


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Write a CLIP with a tokenizer of letters; return its folder."""
    from transformers import CLIPConfig, CLIPModel

    folder.mkdir()
    letters = [*string.ascii_lowercase, "-"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens += ["re", "red</w>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = vocabulary["<|endoftext|>"]
    text = {**sizes, "vocab_size": len(vocabulary), "eos_token_id": end, "initializer_factor": 20.0}
    vision = {**sizes, "image_size": SIDE, "patch_size": 8, "initializer_factor": 20.0}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, initializer_factor=20.0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def prepared(image: Image.Image) -> torch.Tensor:
    """As open_clip prepares an image: the shorter side scaled by Pillow's bicubic, the centre cut out, normalised."""
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, int(length * scale)) for length in image.size)
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64) / 255
    top, left = (height - SIDE) // 2, (width - SIDE) // 2
    cut = scaled[top : top + SIDE, left : left + SIDE]
    return torch.from_numpy(((cut - CLIP_MEAN) / CLIP_DEVIATION).transpose(2, 0, 1)).float()[None]


def unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(vector / np.linalg.norm(vector))
