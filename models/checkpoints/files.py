"""Tensors in files: names and shapes at once, values one at a time when they are asked for."""

from __future__ import annotations

import argparse
import json
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftwork.models.checkpoints.fit import UnfitCheckpoint

Shape = tuple[int, ...]
UNREADABLE = (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError)  # what damaged files raise
NO_TENSORS = "holds no tensors in torch's format"
GLOBAL = r"[A-Za-z_][\w.]*\.\w+"  # module and name; in text taken for a pickle, hardly ever


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds: `get` reads one tensor, mapped from the file or in memory of its own."""

    source: str
    shapes: Mapping[str, Shape]
    get: Callable[[str], Tensor]


def in_memory(source: str, state: Mapping[str, Tensor]) -> Tensors:
    return Tensors(source, {name: tuple(value.shape) for name, value in state.items()}, state.__getitem__)


def read_tensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors`, or of a torch file that holds a state dict and nothing else."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = read_torch(path)
    if not is_state(state):
        raise UnfitCheckpoint(f"{path}: holds no state dict")
    return in_memory(str(path), state)


def read_shards(index: Path) -> Tensors:
    """The tensors of the files that an index beside them names: {"weight_map": {tensor: file}}."""
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        if any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("a file elsewhere")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UnfitCheckpoint(f"{index}: is no index of tensors in files") from None
    shards = {name: read_tensors(index.with_name(name)) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].shapes:
            raise UnfitCheckpoint(f"{index.with_name(name)}: has no {tensor}, which {index.name} places there")
    shapes = {tensor: shards[name].shapes[tensor] for tensor, name in weight_map.items()}
    return Tensors(str(index), shapes, lambda tensor: shards[weight_map[tensor]].get(tensor))


def _read_safetensors(path: Path) -> Tensors:
    try:
        # Read, not mapped: tensors lie unaligned in these files, and have to be copied (see `fit.settled`).
        file = safe_open(path, "pt", backend="pread")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except UNREADABLE as error:
        raise UnfitCheckpoint(f"{path}: cannot be read as tensors: {_first_line(error)}") from None
    return Tensors(str(path), shapes, file.get_tensor)


def is_state(content: object) -> bool:
    """Whether it is a state dict: tensors by name."""
    return isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def read_torch(path: Path) -> Any:
    """What torch.save wrote, of tensors, plain values and `argparse.Namespace`; tensors are mapped, not read.

    The published files carry their training arguments in such a namespace. Raises UnfitCheckpoint for any other pickle,
    of which nothing is run.
    """
    try:
        mappable = zipfile.is_zipfile(path)  # torch's format since 1.6
        if mappable and _inflates(path):
            raise UnfitCheckpoint(f"{path}: refused, it is compressed, which torch's files are not")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except UnpicklingError as error:
        name = _refused_global(path, str(error))
        problem = f"refused, unpickling it would call {name}" if name else NO_TENSORS
    except UnfitCheckpoint:
        raise
    except (RuntimeError, OSError) as error:  # the two that say what is wrong
        problem = f"cannot be read as tensors: {_first_line(error)}"
    except Exception:  # text or noise, taken for a pickle, raises whatever its bytes happen to stand for
        problem = NO_TENSORS
    raise UnfitCheckpoint(f"{path}: {problem}") from None


def _inflates(path: Path) -> bool:
    """Whether a zip file holds more than it has bytes."""
    with zipfile.ZipFile(path) as file:
        parts = file.infolist()
    return any(part.compress_type != zipfile.ZIP_STORED for part in parts) or (
        sum(part.file_size for part in parts) > path.stat().st_size
    )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _refused_global(path: Path, message: str) -> str | None:
    """What torch would not call: named in its message, or in a pickle too new for it."""
    if named := re.search(rf"GLOBAL ({GLOBAL})", message):
        return named[1]
    with path.open("rb") as file:
        known = ("collections.OrderedDict", "argparse.Namespace")
        names = (name for name in _globals(file) if re.fullmatch(GLOBAL, name))
        return next((name for name in names if name not in known and not name.startswith("torch.")), None)


def _globals(file: IO[bytes]) -> Iterator[str]:
    """The globals that a pickle names, in order; it is looked at, not run."""
    strings: list[str] = []  # as pushed; the last two are what STACK_GLOBAL takes
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                yield ".".join(str(argument).rsplit(" ", 1))
            elif opcode.name == "STACK_GLOBAL":
                yield ".".join(strings[-2:])
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                strings.append(memo.get(int(str(argument)), ""))
            elif isinstance(argument, str):
                strings.append(argument)
    except (ValueError, OverflowError, MemoryError):  # no pickle, or the end of a torn one
        return
