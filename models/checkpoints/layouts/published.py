"""The published layout: DiT's `.pt`, and grafts with the scion's tensors under `blocks.{i}.attn.` or `.mlp.`

A plain state dict, or a dict of `ema` and `model` (state dicts), `opt`, and `args` (argparse.Namespace), as DiT's
training script writes it, or whatever other tools make of that (see wrappers.py); the averaged weights are what is
evaluated. Sampling scripts read `ema` and load it strictly.
Ours have their `args` in a dict, so that torch.load takes the file as it is, with nothing declared safe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from graftwork.models.checkpoints import statements
from graftwork.models.checkpoints.errors import UnfitCheckpoint
from graftwork.models.checkpoints.files import Tensors, is_safetensors, read_safetensors
from graftwork.models.checkpoints.pickles import read_torch
from graftwork.models.checkpoints.recognition import Found, edits_json, fields_of, parse_description
from graftwork.models.checkpoints.wrappers import model_in, unwrapped
from graftwork.models.rootstocks import CONFIGS, Rootstock
from graftwork.specs.edits import Edit

WEIGHTS = "model.pt"


def find(path: Path) -> Found:
    """Return the weights in a file of whatever a training script puts there, the averaged ones before others."""
    if is_safetensors(path):
        return of_tensors(read_safetensors(path), path)
    content = read_torch(path)
    kinds = _kinds(path, statements.statements(content))
    tensors, notes = model_in(str(path), content)
    args = _arguments(content.get("args")) if isinstance(content, dict) else {}
    ours = args.get("graftwork")
    if not isinstance(ours, dict):
        count = args.get("num_classes")
        count = count if type(count) is int else None
        return Found(tensors, heads=_heads(args, tensors), kinds=kinds, num_classes=count, notes=tuple(notes))
    rootstock, edits = parse_description(str(path), ours.get("rootstock", {}), ours.get("edits", ()))
    return Found(tensors, heads=rootstock.heads, config=rootstock, edits=edits, notes=tuple(notes))


def of_tensors(tensors: Tensors, path: Path) -> Found:
    """Return the weights in files of nothing but tensors, one of which is at `path`."""
    kinds = _kinds(path, statements.of_metadata(tensors.metadata))
    model, notes = unwrapped(tensors)
    return Found(model, kinds=kinds, notes=tuple(notes))


def _kinds(path: Path, entries: Iterator[tuple[str, Any]]) -> frozenset[str]:
    """Return the kinds of rootstock that it can be by what the file, its name or a document beside it says.

    Raise UnfitCheckpoint if that is a model which is not ours.
    """
    by_name = [("model", path.stem)] if statements.SIZED.fullmatch(path.stem) else []
    if by_name and not statements.is_named_as_ours(path.stem) and statements.is_of_another_family(path.stem):
        raise UnfitCheckpoint(f"{path}: is of another model, by its name", statements.accepted())
    return statements.kinds_of(str(path), chain(by_name, entries, statements.beside(path)))


def write(model: Rootstock, edits: Sequence[Edit], folder: Path) -> None:
    """`args` has `graftwork` for `find`: what the tensors do not tell, as the heads and some settings of operators."""
    config = model.config
    args: dict[str, Any] = {
        **config.published_arguments(),
        "graftwork": {"rootstock": fields_of(config), "edits": edits_json(edits)},
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    torch.save({"ema": state, "args": args}, folder / WEIGHTS)


def _arguments(args: object) -> dict[str, Any]:
    """A dict or a Namespace, as a dict."""
    return args if isinstance(args, dict) else dict(getattr(args, "__dict__", {}))


def _heads(args: dict[str, Any], tensors: Tensors) -> int | None:
    """Return attention heads, as the name of the model tells that was trained (`DiT-XL/2`), if its tensors can have
    them."""
    name = str(args.get("model", ""))
    known = (config.heads_of(name, tensors.shapes) for config in CONFIGS.values())
    return next((heads for heads in known if heads is not None), None)
