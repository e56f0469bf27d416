"""Reading a checkpoint of whatever layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graftwork.models.checkpoints import folders
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.files import read_index, read_shards
from graftwork.models.checkpoints.fit import build, fitting
from graftwork.models.checkpoints.labels import Labels, num_classes, relabelled
from graftwork.models.checkpoints.layouts import diffusers, diffusers_pixart, native, published
from graftwork.models.checkpoints.recognition import Found, recognised
from graftwork.models.rootstocks import Rootstock, RootstockConfig
from graftwork.specs.edits import Edit
from graftwork.specs.hub import INDEX, SHARD, local_path, parts_of, whereabouts
from graftwork.specs.problems import shown

ACCEPTED = "a .pt or .safetensors file, whole or in parts, or a folder with one; ours, or one of diffusers' DiTs"


def read(
    source: str | Path,
    *,
    config: RootstockConfig | None = None,
    heads: int | None = None,
    device: torch.device | str | None = None,
    labels: Labels | None = None,
    any_classes: bool = False,
) -> tuple[Rootstock, tuple[Edit, ...]]:
    """The model in a file or folder, or under a hub id, and the edits that it carries.

    config: the rootstock that it has to be of; without it, the one that its shapes tell.
    heads: attention heads, which shapes do not tell; needed where neither the file nor a published size does.
    labels: the rows of another label table, for the classes of `config`.
    any_classes: whether it may have other classes than `config`.

    Raises UnfitCheckpoint, in one line, for what is no checkpoint or one of another model.
    """
    checkpoint, rootstock, edits = _recognised(source, config, heads, labels, any_classes)
    return build(rootstock, edits, checkpoint.tensors, device), edits


def check(
    source: str | Path, config: RootstockConfig, *, labels: Labels | None = None, any_classes: bool = False
) -> tuple[str, ...]:
    """Raise UnfitCheckpoint as `read` would, by names and shapes alone: no tensor is read.

    Return the notes on a checkpoint that fits: which of several models is read, and what is left out.
    """
    checkpoint, rootstock, edits = _recognised(source, config, None, labels, any_classes)
    fitting(rootstock, edits, checkpoint.tensors)
    if not checkpoint.kinds and checkpoint.config is None and rootstock.files.network is not None:
        words = " and ".join(f"args.{argument}" for argument in rootstock.files.arguments)
        unsaid = f"{checkpoint.tensors.source}: does not say what it predicts (by {words}, or its name)"
        return (*checkpoint.notes, f"{unsaid}; it is taken for a {rootstock.kind}, as model.kind says")
    return checkpoint.notes


def _recognised(
    source: str | Path, config: RootstockConfig | None, heads: int | None, labels: Labels | None, any_classes: bool
) -> tuple[Found, RootstockConfig, tuple[Edit, ...]]:
    checkpoint = find(located(source))
    if labels is not None:
        checkpoint = replace(checkpoint, tensors=relabelled(checkpoint.tensors, labels, checkpoint.num_classes))
    if config is not None and any_classes:
        config = replace(config, num_classes=num_classes(checkpoint.tensors) or config.num_classes)
    rootstock, edits = recognised(checkpoint, config, heads)
    return replace(checkpoint, tensors=checkpoint.tensors.without(rootstock.files.unused)), rootstock, edits


def located(source: str | Path, accepted: str = ACCEPTED, part: str = "transformer") -> Path:
    """The file or folder on this machine; a hub id is fetched unless the hub's cache has it, see `local_path`."""
    try:
        path = local_path(str(source), part)
    except (OSError, ValueError) as error:  # what the hub's library raises of the network, and of names
        reason = str(error).splitlines()[0]
        raise UnfitCheckpoint(f"{source}: {whereabouts(str(source), part)}, and cannot be fetched: {reason}") from None
    if not path.exists():
        raise UnfitCheckpoint(f"{source}: no such file or folder", accepted)
    if not path.is_file() and not path.is_dir():  # a pipe or a device, of which reading would never end
        raise UnfitCheckpoint(f"{source}: neither a file nor a folder", accepted)
    return path


def find(path: Path) -> Found:
    """What is there, in its layout."""
    return _in_file(path) if path.is_file() else _in_folder(path)


def _in_file(path: Path) -> Found:
    # A file that one of the layouts with a config.json names its weights by is read with it.
    config = _config(path.parent)
    if path.name in (native.WEIGHTS, *diffusers.WEIGHTS) and _is_known(config):
        return find(path.parent)
    if path.name.endswith(INDEX):
        return published.of_tensors(read_index(path), path)
    if SHARD.fullmatch(path.name):
        return published.of_tensors(read_shards(parts_of(path)), path)
    return published.find(path)


def _in_folder(path: Path) -> Found:
    config = _config(path)
    if config.get("format") == native.FORMAT:
        return native.find(path, config)
    if diffusers_pixart.is_ours(config):
        return diffusers_pixart.find(path, config)
    if config.get("_class_name") in diffusers.CLASSES:
        return diffusers.find(path, config)
    if "_class_name" in config:
        raise UnfitCheckpoint(
            f"{path}: is of diffusers' class {shown(config['_class_name'])}, by its config.json",
            ", ".join((*diffusers.CLASSES, diffusers_pixart.CLASS)),
        )
    pipeline = [name for name in ("transformer_ema", "transformer") if (path / name).is_dir()]
    if pipeline:
        checkpoint = find(path / pipeline[0])
        notes = tuple(f"{path}: {pipeline[0]} is read, not {other}" for other in pipeline[1:])
        return replace(checkpoint, notes=(*notes, *checkpoint.notes))
    files, others = folders.model_files(path, ACCEPTED)
    notes = tuple(f"{path}: {files[0].name} is read, not {other.name}" for other in others)
    checkpoint = _in_file(files[0])
    return replace(checkpoint, notes=(*notes, *checkpoint.notes))


def _is_known(config: dict[str, Any]) -> bool:
    return config.get("format") == native.FORMAT or "_class_name" in config


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty where there is none that could name a layout."""
    try:
        config = json.loads((folder / native.CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
