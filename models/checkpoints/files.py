"""Tensors in files: names and shapes at once, values one at a time when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftwork.models.checkpoints.errors import UnfitCheckpoint, named
from graftwork.models.checkpoints.pickles import first_line, read_torch, require_content
from graftwork.specs.hub import SHARD

Shape = tuple[int, ...]
UNREADABLE = (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError)  # what damaged files raise
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
SAFETENSORS_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class Tensors:
    """What a checkpoint holds: `get` reads one tensor, mapped from the file or in memory of its own."""

    source: str
    shapes: Mapping[str, Shape]
    get: Callable[[str], Tensor]
    odd: Mapping[str, str] = field(default_factory=dict)  # of tensors that are no plain floats: what they are, by name
    metadata: Mapping[str, str] = field(default_factory=dict)  # text beside the tensors

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """Return the tensors under other names. names: new name -> the tensor's name here; others are left out."""
        odd = {new: self.odd[old] for new, old in names.items() if old in self.odd}
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return Tensors(self.source, shapes, lambda new: self.get(names[new]), odd, self.metadata)

    def without(self, names: Collection[str]) -> Tensors:
        """Return the tensors but those of these names."""
        return self.renamed({name: name for name in self.shapes if name not in names})

    def joined(self, names: Mapping[str, Sequence[str]], made: Mapping[str, Made]) -> Tensors:
        """Return tensors that are made of these here, row upon row, and others that are computed.

        names: new name -> the names of tensors here, all of one shape.
        """

        def get(name: str) -> Tensor:
            if name in made:
                return made[name].make()
            rows = [self.get(old) for old in names[name]]
            return rows[0] if len(rows) == 1 else torch.cat(rows)

        odd = {new: self.odd[old] for new, several in names.items() for old in several if old in self.odd}
        shapes = {new: self.shapes[several[0]] for new, several in names.items()}
        for new, several in names.items():
            if len(several) > 1:
                shapes[new] = (len(several) * shapes[new][0], *shapes[new][1:])
        return Tensors(self.source, shapes | {name: one.shape for name, one in made.items()}, get, odd)


@dataclass(frozen=True)
class Made:
    """A tensor that a file does not hold, and that follows from what it is of."""

    shape: Shape
    make: Callable[[], Tensor]


def in_memory(source: str, state: Mapping[str, Tensor]) -> Tensors:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    odd = {name: kind for name, value in state.items() if (kind := odd_kind(value))}
    return Tensors(source, shapes, state.__getitem__, odd)


def odd_kind(value: Tensor) -> str | None:
    """Return what a tensor is that is no plain array of floats, as `int8` or `sparse_coo float32`; None for those."""
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        return f"{dtype} without values (meta)"
    if value.layout != torch.strided:
        return f"{str(value.layout).removeprefix('torch.')} {dtype}"
    return None if value.dtype in FLOATS else dtype


def read_tensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors`, or of a torch file that holds a state dict and nothing else."""
    if is_safetensors(path):
        return read_safetensors(path)
    state = read_torch(path)
    if not is_state(state):
        raise UnfitCheckpoint(f"{path}: holds no state dict")
    return in_memory(str(path), state)


def read_index(index: Path) -> Tensors:
    """Return the tensors of the files that an index beside them names: {"weight_map": {tensor: file}}."""
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        files = sorted(set(weight_map.values()))
        elsewhere = [name for name in files if Path(name).name != name or name in ("", ".", "..")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UnfitCheckpoint(f"{index}: is no index of tensors in files") from None
    if elsewhere:
        raise UnfitCheckpoint(f"{index}: names {named(elsewhere, 3)}, expected files beside it")
    if absent := [name for name in files if not index.with_name(name).is_file()]:
        raise UnfitCheckpoint(f"{index}: names {named(absent, 3)}, of which there is no such file beside it")
    shards = {name: read_tensors(index.with_name(name)) for name in files}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].shapes:
            raise UnfitCheckpoint(f"{index.with_name(name)}: has no {tensor}, which {index.name} places there")
    return _joined(str(index), {tensor: shards[name] for tensor, name in weight_map.items()})


def read_shards(files: Sequence[Path]) -> Tensors:
    """Return the tensors of files numbered `-00001-of-00002` and on, without an index."""
    first = SHARD.fullmatch(files[0].name)
    assert first is not None
    numbers = range(1, int(first["count"]) + 1)
    wanted = [f"{first['stem']}-{number:05d}-of-{first['count']}{first['suffix']}" for number in numbers]
    if absent := sorted(set(wanted) - {file.name for file in files}):
        raise UnfitCheckpoint(f"{files[0].parent}: has no {named(absent, 3)}, a part of its checkpoint")
    owners: dict[str, Tensors] = {}
    for file in files:
        shard = read_tensors(file)
        if double := sorted(owners.keys() & shard.shapes.keys()):
            raise UnfitCheckpoint(f"{file}: has {named(double, 3)}, as another part of its checkpoint has")
        owners |= dict.fromkeys(shard.shapes, shard)
    return _joined(str(files[0].parent), owners)


def _joined(source: str, owners: Mapping[str, Tensors]) -> Tensors:
    """Return the tensors of several files. owners: by the tensor's name."""
    shapes = {name: owner.shapes[name] for name, owner in owners.items()}
    odd = {name: owner.odd[name] for name, owner in owners.items() if name in owner.odd}
    metadata: dict[str, str] = {}
    for owner in owners.values():
        metadata |= owner.metadata
    return Tensors(source, shapes, lambda name: owners[name].get(name), odd, metadata)


def is_safetensors(path: Path) -> bool:
    """Return whether a file is of that format: by its first bytes, whatever it is called."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        start = b""
    if path.suffix.lower() == ".safetensors":
        if start.startswith(b"PK"):  # torch.load goes by the name, too
            raise UnfitCheckpoint(f"{path}: is torch's, by its content", "a file of torch's with a name in .pt")
        return True
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> Tensors:
    require_content(path)
    try:
        # Read, not mapped: tensors lie unaligned in these files, and have to be copied (see `fit.settled`).
        file = safe_open(path, "pt", backend="pread")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, no mapping
        shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
        dtypes = {name: one.get_dtype() for name, one in slices.items()}
        metadata = file.metadata() or {}
    except UNREADABLE as error:
        raise UnfitCheckpoint(f"{path}: cannot be read as tensors: {first_line(error)}") from None
    odd = {name: _torch_name(dtype) for name, dtype in dtypes.items() if dtype not in SAFETENSORS_FLOATS}
    return Tensors(str(path), shapes, file.get_tensor, odd, metadata)


def _torch_name(dtype: str) -> str:
    """Return `I8` as torch says it, `int8`."""
    kinds = {"I": "int", "U": "uint", "F": "float", "C": "complex"}
    name = f"{kinds[dtype[0]]}{dtype[1:].lower()}" if dtype[0] in kinds else dtype.lower()
    return {"float8_e4m3": "float8_e4m3fn", "float8_e8m0": "float8_e8m0fnu"}.get(name, name)


def is_state(content: object) -> bool:
    """Whether it is a state dict: tensors by name."""
    return isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
