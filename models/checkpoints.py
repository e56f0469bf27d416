"""Models as files: safetensors with a `config.json` that rebuilds the model; and DiT's published `.pt`, read only.

Only tensors are ever read: safetensors, or torch.load with weights_only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.dit import DiT, DiTConfig
from models.surgery import graft
from specs.graft import Edit

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHOWN = 10  # tensors that an error names at most


class UnfitCheckpoint(ValueError):
    """A file that is no checkpoint, or one of another model; the message is one line."""


def save(model: DiT, edits: Sequence[Edit], folder: Path) -> None:
    """Write the model's tensors and what rebuilds it."""
    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    config = {
        "format": "graftwork.dit/1",
        "rootstock": asdict(model.config),
        "edits": [edit.model_dump(mode="json") for edit in edits],
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def load(folder: Path) -> tuple[DiT, tuple[Edit, ...]]:
    """The model in a folder that `save` wrote, and the edits that it carries."""
    config = json.loads((folder / CONFIG).read_text())
    edits = tuple(Edit.model_validate(edit) for edit in config["edits"])
    model = graft(DiT(DiTConfig(**config["rootstock"])), edits, seed=0)
    fill(model, load_file(folder / WEIGHTS), str(folder / WEIGHTS))
    return model, edits


def fill(model: DiT, state: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the model; raises UnfitCheckpoint, naming those that do not fit."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    problems = [
        f"{name}: {found.get(name, 'missing')}, expected {wanted.get(name, 'none of that name')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UnfitCheckpoint(f"{source}: does not fit the model: {'; '.join(problems[:SHOWN])}{more}")
    model.load_state_dict(state)


def read_published(path: Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors` or in DiT's `.pt`, whose EMA weights are preferred."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The published files carry their training arguments beside the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        raise UnfitCheckpoint(f"{path}: cannot be read as tensors: {str(error).splitlines()[0]}") from None
    for part in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UnfitCheckpoint(f"{path}: holds no state dict")
    return content
