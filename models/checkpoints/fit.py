"""Whether tensors are those of a model, and how they get into it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.checkpoints.files import Shape, Tensors, odd_kind
from graftwork.models.checkpoints.labels import label_table
from graftwork.models.rootstocks import CONFIGS, Rootstock, RootstockConfig, new_rootstock
from graftwork.models.surgery import graft
from graftwork.specs.costs import rootstock_cost
from graftwork.specs.edits import Edit

MAX_NAMED = 3  # tensors of a kind of misfit that an error names
MAX_SIZE_RATIO = 16  # refuse a config with more than so many times the numbers that the file holds
OTHER_CLASSES = "a checkpoint of the job's classes, or weights.classes: fresh or {class: row}, for one's own classes"
ALIGNMENT = 64  # bytes, of what torch allocates


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in state.items()}


class Uninitialised(TorchFunctionMode):
    """Initialisers do nothing inside. (The meta device would serve too, but arithmetic on it imports torch's compiler,
    which takes two seconds and 150 MB.)"""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def weightless(config: RootstockConfig, edits: Iterable[Edit]) -> Rootstock:
    """The model before it has weights: memory is reserved for them and never touched, so that none is used."""
    with Uninitialised():
        return graft(new_rootstock(config), edits, seed=0)


def fitting(config: RootstockConfig, edits: Iterable[Edit], tensors: Tensors) -> Rootstock:
    """The model before it has weights; raises UnfitCheckpoint, naming the tensors that do not fit it."""
    held = sum(math.prod(shape) for shape in tensors.shapes.values())
    asked = rootstock_cost(config, config.place, config.in_channels, config.num_classes).params
    if asked > MAX_SIZE_RATIO * held:
        raise UnfitCheckpoint(f"{tensors.source}: holds {held:,} numbers, expected a model of about {asked:,}")
    try:
        model = weightless(config, edits)
    except (RuntimeError, MemoryError, OverflowError) as error:  # settings of an operator that no memory has room for
        reason = str(error).splitlines()[0] if str(error) else "it is too large"
        raise UnfitCheckpoint(f"{tensors.source}: no such model can be made: {reason}") from None
    _check(shapes_of(model.state_dict()), tensors.shapes, tensors.source)
    return model


def build(
    config: RootstockConfig, edits: Iterable[Edit], tensors: Tensors, device: torch.device | str | None = None
) -> Rootstock:
    """The model with these tensors; raises UnfitCheckpoint, naming those that do not fit, or hold no numbers."""
    model = fitting(config, edits, tensors)
    state = {
        name: settled(_numbers(name, tensors.get(name), tensors.source), like.dtype, device or "cpu")
        for name, like in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model


def require_floats(tensors: Tensors) -> None:
    """Raise UnfitCheckpoint if tensors are of a kind that no weights are: integers, 8-bit floats, sparse, complex."""
    odd = [f"{name}: holds {kind}, expected float32" for name, kind in sorted(tensors.odd.items())]
    if odd:
        raise UnfitCheckpoint(f"{tensors.source}: {named(odd, MAX_NAMED)}")


def _numbers(name: str, value: Tensor, source: str) -> Tensor:
    """The tensor, if it can stand for weights: NaN and infinity are of no scale."""
    if kind := odd_kind(value):
        raise UnfitCheckpoint(f"{source}: {name}: holds {kind}, expected float32")
    if value.numel() and not all(map(math.isfinite, map(float, value.aminmax()))):
        raise UnfitCheckpoint(f"{source}: {name}: holds NaN or infinity, expected numbers")
    return value


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the model. Raise UnfitCheckpoint, with the names of those that do not fit."""
    _check(shapes_of(model.state_dict()), shapes_of(state), source)
    model.load_state_dict(state)


def settled(value: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The tensor where and as the model wants it; as it is, also mapped from its file, if it is that already.

    A matrix product rounds differently where its weights are not aligned as torch allocates them: for the same bits
    everywhere, such weights are moved.
    """
    value = value.detach().to(device=device, dtype=dtype)
    aligned = value.data_ptr() % ALIGNMENT == 0 and value.is_contiguous()
    return value if aligned else value.clone(memory_format=torch.contiguous_format)


def _check(wanted: Mapping[str, Shape], shapes: Mapping[str, Shape], source: str) -> None:
    """Raise UnfitCheckpoint if names or shapes differ, with a few whole names for each kind of difference."""
    reshaped = [
        f"{name}: {shapes[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & shapes.keys())
        if wanted[name] != shapes[name]
    ]
    missing, unknown = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    problems = [named(reshaped, MAX_NAMED)] if reshaped else []
    problems += [f"missing {named(missing, MAX_NAMED, ', ')}"] if missing else []
    problems += [f"has {named(unknown, MAX_NAMED, ', ')}, expected none of that name"] if unknown else []
    if problems:
        accepted = "" if missing or unknown else _setting_for(wanted, shapes)
        raise UnfitCheckpoint(f"{source}: does not fit the model: {'; '.join(problems)}", accepted)


def _setting_for(wanted: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> str:
    """Return the setting that makes a job fit a checkpoint's shapes, or an empty string if no single setting does."""
    differing = {name for name in wanted if wanted[name] != shapes[name]}
    table = label_table(differing)
    if table is not None and len(differing) == 1 and wanted[table][1:] == shapes[table][1:]:
        return OTHER_CLASSES
    outputs = (config.files.output for config in CONFIGS.values())
    output = next((layer for layer in outputs if differing <= {f"{layer}.weight", f"{layer}.bias"}), None)
    if output is not None:
        rows, ours = shapes[f"{output}.bias"], wanted[f"{output}.bias"]
        if ours == (2 * rows[0],):
            return "a checkpoint that predicts its variance, or model.learn_sigma: false"
        if rows == (2 * ours[0],):
            return "a checkpoint that predicts no variance, or model.learn_sigma: true"
    return ""
