"""Small pictures with captions, and a text encoder of T5's class, to be made in a moment: for tests of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (230, 220, 40)}
CHANNELS = 32  # of the encoder's states


def write_pictures(folder: Path, count: int = 24, side: int = 16) -> dict[str, str]:
    """Write pictures of one colour each; return the caption of each by its file's name. Captions repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for number in range(count):
        colour, size = list(COLOURS)[number % 4], ("small", "large")[number // 4 % 2]
        pixels = np.full((side, side, 3), 128, np.uint8)
        margin = side // 4 if size == "large" else 3 * side // 8
        pixels[margin : side - margin, margin : side - margin] = COLOURS[colour]
        name = f"{number:03d}.png"
        Image.fromarray(pixels).save(folder / name)
        captions[name] = f"a {size} {colour} square"
    return captions


def write_table(folder: Path, captions: dict[str, str]) -> None:
    """Write `metadata.jsonl`."""
    lines = [json.dumps({"file_name": name, "text": caption, "more": 1}) for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def captioned(folder: Path, count: int = 24) -> Path:
    """Return a folder of pictures with their captions in a table."""
    write_table(folder, write_pictures(folder, count))
    return folder


def write_encoder(folder: Path, **changed: Any) -> Path:
    """Write a T5 encoder with random weights and a tokenizer of bytes, as a pipeline has them; return the folder."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    shape = {"vocab_size": 384, "d_model": CHANNELS, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    config = T5Config(**shape | {"feed_forward_proj": "gated-gelu"} | changed)
    torch.manual_seed(0)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    ByT5Tokenizer().save_pretrained(folder / "tokenizer")
    return folder
