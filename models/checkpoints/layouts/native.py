"""Ours: safetensors, with a `config.json` that rebuilds the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from graftwork.models.checkpoints.files import read_tensors
from graftwork.models.checkpoints.fit import build
from graftwork.models.checkpoints.recognition import Found, edits_json, fields_of, parse_description
from graftwork.models.rootstocks import Rootstock, RootstockConfig
from graftwork.specs.edits import Edit

WEIGHTS, CONFIG, FORMAT = "model.safetensors", "config.json", "graftwork.dit/1"


def save(model: Rootstock, edits: Sequence[Edit], folder: Path) -> None:
    """Write the model's tensors and what rebuilds it."""
    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    config = {
        "format": FORMAT,
        "rootstock": fields_of(model.config),
        "edits": edits_json(edits),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def load(folder: Path, *, device: torch.device | str | None = None) -> tuple[Rootstock, tuple[Edit, ...]]:
    """The model in a folder that `save` wrote, and the edits that it carries."""
    found = find(folder, json.loads((folder / CONFIG).read_text()))
    assert found.config is not None and found.edits is not None
    return build(found.config, found.edits, found.tensors, device), found.edits


def describe(folder: Path) -> tuple[RootstockConfig, tuple[Edit, ...]]:
    """What the model in a folder that `save` wrote is, and the edits that it carries; none of its tensors is read."""
    return _description(folder, json.loads((folder / CONFIG).read_text()))


def _description(folder: Path, config: dict[str, Any]) -> tuple[RootstockConfig, tuple[Edit, ...]]:
    return parse_description(str(folder / CONFIG), config.get("rootstock", {}), config.get("edits", ()))


def find(folder: Path, config: dict[str, Any]) -> Found:
    rootstock, edits = _description(folder, config)
    return Found(read_tensors(folder / WEIGHTS), heads=rootstock.heads, config=rootstock, edits=edits)
