"""The published layout: DiT's `.pt`, and grafts with the scion's tensors under `blocks.{i}.attn.` or `.mlp.`

A plain state dict, or a dict of `ema` and `model` (state dicts), `opt`, and `args` (argparse.Namespace), as DiT's
training script writes it; the averaged weights are what is evaluated. Sampling scripts read `ema` and load it strictly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from models.checkpoints.files import in_memory, is_state, read_tensors, read_torch
from models.checkpoints.fit import UnfitCheckpoint
from models.checkpoints.recognition import Found, edits_from, edits_json
from models.dit import DiT, DiTConfig
from specs.graft import Edit
from specs.model import SIZES

WEIGHTS = "model.pt"
PIXELS = 8  # along a side of a latent's element, in the published autoencoder


def find(path: Path) -> Found:
    """The file's weights: averaged ones before others, and nothing else is read of it."""
    if path.suffix == ".safetensors":
        return Found(read_tensors(path))
    content = read_torch(path)
    args = content.get("args") if isinstance(content, dict) else None
    for part in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    if not is_state(content):
        raise UnfitCheckpoint(f"{path}: holds no state dict")
    edits = getattr(args, "edits", None)
    return Found(
        in_memory(str(path), content),
        heads=_heads(args),
        edits=None if edits is None else edits_from(edits),
    )


def write(model: DiT, edits: Sequence[Edit], folder: Path) -> None:
    """`args` also holds what the tensors do not tell, for `find`: the heads, and each operator's settings."""
    config = model.config
    args = argparse.Namespace(
        model=published_name(config),
        image_size=PIXELS * config.input_size,
        num_classes=config.num_classes,
        num_heads=config.heads,
        edits=edits_json(edits),
    )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    torch.save({"ema": state, "args": args}, folder / WEIGHTS)


def published_name(config: DiTConfig) -> str | None:
    """`DiT-XL/2` and the like; None where the shape is no published one."""
    shape = (config.depth, config.width, config.heads)
    return next((f"DiT-{letter}/{config.patch}" for letter, size in SIZES.items() if size == shape), None)


def _heads(args: object) -> int | None:
    """Attention heads, as the training arguments tell them: `num_heads` in ours, the model's name in DiT's."""
    if isinstance(heads := getattr(args, "num_heads", None), int):
        return heads
    letter = str(getattr(args, "model", "")).removeprefix("DiT-").partition("/")[0]
    return SIZES[letter][2] if letter in SIZES else None
