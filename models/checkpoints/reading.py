"""Reading a checkpoint of whatever layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from graftwork.models.checkpoints import diffusers, native, published
from graftwork.models.checkpoints.fit import UnfitCheckpoint, build, fitting
from graftwork.models.checkpoints.recognition import Found, recognised
from graftwork.models.dit import DiT, DiTConfig
from graftwork.specs.graft import Edit
from graftwork.specs.hub import local_path

ACCEPTED = (
    "accepted: a .pt or .safetensors file, a folder that Graftwork wrote, a diffusers DiT or DiTPipeline folder, "
    "or a folder with model.pt"
)


def read(
    source: str | Path,
    *,
    config: DiTConfig | None = None,
    heads: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[DiT, tuple[Edit, ...]]:
    """The model in a file or folder, or under a hub id, and the edits that it carries.

    config: the rootstock that it has to be of; without it, the one that its shapes tell.
    heads: attention heads, which shapes do not tell; needed where neither the file nor a published size does.

    Raises UnfitCheckpoint, in one line, for what is no checkpoint or one of another model.
    """
    found = find(located(source))
    rootstock, edits = recognised(found, config, heads)
    return build(rootstock, edits, found.tensors, device), edits


def check(source: str | Path, config: DiTConfig) -> None:
    """Raise UnfitCheckpoint as `read` would, as far as names and shapes tell: no tensor is read."""
    found = find(located(source))
    rootstock, edits = recognised(found, config, None)
    fitting(rootstock, edits, found.tensors)


def located(source: str | Path, accepted: str = ACCEPTED) -> Path:
    """The file or folder on this machine; a hub id is fetched unless the hub's cache has it."""
    try:
        path = local_path(str(source))
    except (OSError, ValueError) as error:  # what the hub's library raises of the network, and of names
        reason = str(error).splitlines()[0]
        raise UnfitCheckpoint(f"{source}: neither here, nor in the hub's cache, nor to be had: {reason}") from None
    if not path.exists():
        raise UnfitCheckpoint(f"{source}: no such file or folder; {accepted}")
    return path


def find(path: Path) -> Found:
    """What is there, in its layout."""
    if path.is_file():
        # A file that one of the layouts with a config.json names its weights by is read with it.
        if path.name in (native.WEIGHTS, *diffusers.WEIGHTS) and _config(path.parent):
            return find(path.parent)
        return published.find(path)
    config = _config(path)
    if config.get("format") == native.FORMAT:
        return native.find(path, config)
    if config.get("_class_name") in diffusers.CLASSES:
        return diffusers.find(path, config)
    if (path / "transformer").is_dir():  # of a pipeline
        return find(path / "transformer")
    files = [file for file in sorted(path.glob("*")) if file.suffix in (".pt", ".safetensors")]
    if (path / published.WEIGHTS) in files or len(files) == 1:
        return published.find(path / published.WEIGHTS if len(files) > 1 else files[0])
    several = f"several checkpoints, {', '.join(file.name for file in files)}" if files else "no checkpoint in it"
    raise UnfitCheckpoint(f"{path}: {several}; {ACCEPTED}")


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty where there is none that could name a layout."""
    try:
        config = json.loads((folder / native.CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
