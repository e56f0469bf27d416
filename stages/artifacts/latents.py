"""The artifact of `features`: what its files are, how they are written, and how the other stages read them.

A split's latents lie in shards, each a .npy file of (n,C,..) float32: `training_latents-00000.npy` and so on, in the
order of their names. They are memory-mapped, so that a split may be larger than the memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor

from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import generator
from graftwork.models.objectives import Objective
from graftwork.models.rootstocks import RootstockConfig, config_of
from graftwork.specs.rootstock import Model

SPLITS = ("training", "heldout")
NUMBERS = "numbers.npy"  # of samples that the rootstock draws: of each split, which of all they are


class LatentsMeta(BaseModel):
    """What the latents are; `meta.json`."""

    model_config = ConfigDict(frozen=True)
    codec: str
    # Latents are the codec's own, times this; a few VAEs shift them before, and divide them by deviations.
    scale: float = 1.0
    shift: float | None = None
    means: tuple[float, ...] | None = None  # of each channel
    deviations: tuple[float, ...] | None = None
    shape: tuple[int, ...]  # of one latent, channels first: (C,S,S) of an image
    classes: tuple[str, ...]
    num_training: int
    num_heldout: int

    @model_validator(mode="before")
    @classmethod
    def _of_squares(cls, values: Any) -> Any:
        """Read what earlier versions wrote, `channels` and `side` of square latents, as their shape."""
        if not isinstance(values, dict) or "side" not in values:
            return values
        others = {name: value for name, value in values.items() if name not in ("channels", "side")}
        return {**others, "shape": (values["channels"], values["side"], values["side"])}

    @property
    def channels(self) -> int:
        return self.shape[0]

    @property
    def side(self) -> int:
        """S of square latents (C,S,S). Raises ValueError for others."""
        _, *sides = self.shape
        if len(sides) != 2 or sides[0] != sides[1]:
            raise ValueError(f"latents: got the shape {self.shape}; accepted: (channels, side, side)")
        return sides[0]

    @property
    def bounded(self) -> bool:
        """Whether latents lie in [-1, 1]: pixels do."""
        return self.codec == "pixel"

    def rootstock_config(self, model: Model) -> RootstockConfig:
        """Return the config of the model that the spec describes, for these latents."""
        return config_of(model, self.shape, len(self.classes))


class Shards:
    """Latents (n,C,..) in several memory-mapped files, read as a tensor is.

    A slice is a view, which reads nothing; a tensor of indices gives a tensor, for which those latents alone are read.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = tuple(parts)
        self.ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.parts[0].shape[1:]))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, chosen: slice) -> Shards: ...

    @overload
    def __getitem__(self, chosen: Tensor) -> Tensor: ...

    def __getitem__(self, chosen: slice | Tensor) -> Shards | Tensor:
        return self._run(chosen) if isinstance(chosen, slice) else self._picked(chosen)

    def split(self, size: int) -> Iterator[Tensor]:
        """Tensors of `size` latents, one after another; the last may be smaller."""
        return (self[start : start + size].tensor() for start in range(0, len(self), size))

    def tensor(self) -> Tensor:
        """All of it, which is read where it lies in more than one file."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def _run(self, chosen: slice) -> Shards:
        start, stop, step = chosen.indices(len(self))
        assert step == 1
        begins = [0, *self.ends.tolist()[:-1]]
        parts = [
            part[max(0, start - begin) : max(0, stop - begin)] for part, begin in zip(self.parts, begins, strict=True)
        ]
        return Shards([part for part in parts if len(part)] or parts[:1])

    def _picked(self, chosen: Tensor) -> Tensor:
        rows = self.parts[0].new_empty((len(chosen), *self.shape[1:]))
        shard = torch.bucketize(chosen, self.ends, right=True)
        for number in shard.unique().tolist():
            here = (shard == number).nonzero().flatten()
            part = self.parts[number]
            rows[here] = part.index_select(0, chosen[here] - (self.ends[number] - len(part)))
        return rows


@dataclass(frozen=True)
class Latents:
    """One split, in an order in which every prefix is class-stratified."""

    x: Tensor | Shards  # (n,C,..) float32
    condition: Condition  # of n
    mirrored: Tensor | Shards | None = None  # like x, of each image's mirror image

    def first(self, count: int) -> Latents:
        mirrored = None if self.mirrored is None else self.mirrored[:count]
        return Latents(self.x[:count], self.condition[:count], mirrored)

    @property
    def labels(self) -> Tensor:
        """The class (n,) of each latent. Raises ValueError where latents have none."""
        return self.condition.require("labels")

    def spread(self, count: int) -> Latents:
        """Return the first turns of the classes, and of the turn that is not full some that are spread over it.

        Of latents without labels, as those of texts, they are the first.
        """
        if self.condition.labels is None:
            return self.first(count)
        turn = len(self.labels.unique())
        rest = count % turn
        full = count - rest
        if rest == 0 or count >= len(self.x):
            return self.first(count)
        chosen = full + torch.arange(rest) * min(turn, len(self.x) - full) // rest
        mirrored = None if self.mirrored is None else _extended(self.mirrored[:full], self.mirrored[chosen])
        condition = self.condition[:full].join(self.condition[chosen])
        return Latents(_extended(self.x[:full], self.x[chosen]), condition, mirrored)

    def stratified(self, count: int) -> Latents:
        """Return the first; but some that are spread over the classes if there are fewer than those."""
        labels = self.condition.labels
        return self.spread(count) if labels is not None and count < len(labels.unique()) else self.first(count)

    def share(self, fraction: float) -> Latents:
        """The same share of each class; at least one latent. Of fewer than there are classes, see `stratified`."""
        return self.stratified(max(1, round(len(self.x) * fraction)))

    def tensor(self) -> Tensor:
        """All of x, in memory where it lies in more than one file: for splits that are known to be small."""
        return self.x if isinstance(self.x, Tensor) else self.x.tensor()


def _extended(x: Tensor | Shards, more: Tensor) -> Tensor | Shards:
    """Return x and what follows it, of which no more is read than was."""
    return torch.cat([x, more]) if isinstance(x, Tensor) else Shards([*x.parts, more])


def either(x: Tensor | Shards, mirrored: Tensor | Shards, chosen: Tensor, mirror: Tensor) -> Tensor:
    """The chosen latents, each of its image or, where `mirror` (n,) is true, of the mirror image."""
    found = torch.empty((len(chosen), *x.shape[1:]), device=x.device)
    found[~mirror] = x[chosen[~mirror]]
    found[mirror] = mirrored[chosen[mirror]]
    return found


def read_meta(folder: Path) -> LatentsMeta:
    return LatentsMeta.model_validate_json((folder / "meta.json").read_text())


def write_meta(folder: Path, meta: LatentsMeta) -> None:
    (folder / "meta.json").write_text(json.dumps(meta.model_dump(mode="json", exclude_none=True), indent=1))


def read(folder: Path, split: str) -> Latents:
    """A split, memory-mapped."""
    labels = torch.from_numpy(np.load(folder / f"{split}_labels.npy"))
    mirrored = _shards(folder, f"{split}_mirrored")
    latents = Shards(_shards(folder, f"{split}_latents"))
    return Latents(latents, Condition(labels=labels), Shards(mirrored) if mirrored else None)


def require_enough(field: str, wanted: int, available: int, kind: str) -> None:
    """Raise ValueError where a split is too small: known beforehand, unless broken images were left out."""
    if wanted > available:
        raise ValueError(f"{field}: got {wanted}; accepted: at most {available}, the {kind} images that can be read")


def _shards(folder: Path, name: str) -> list[Tensor]:
    return [torch.from_numpy(np.load(path, mmap_mode="c")) for path in sorted(folder.glob(f"{name}*.npy"))]


class ShardWriter:
    """A shard that is filled in any order. Nothing of it stays in memory; a full disk is an OSError."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.item_bytes = path, 4 * math.prod(shape[1:])
        described = {"descr": "<f4", "fortran_order": False, "shape": shape}
        with path.open("xb") as file:
            np.lib.format.write_array_header_1_0(file, described)
            self.begin = file.tell()
            file.truncate(self.begin + shape[0] * self.item_bytes)

    def write(self, start: int, latents: NDArray[np.float32]) -> None:
        """Latents (n,C,..) from item `start` on; raises OSError."""
        with self.path.open("r+b") as file:
            file.seek(self.begin + start * self.item_bytes)
            file.write(np.ascontiguousarray(latents).data)


@dataclass(frozen=True)
class Noised:
    """Latents with noise at timesteps that the objective draws: what the rootstock is run on."""

    z: Tensor  # (n,C,..)
    t: Tensor  # (n,)
    condition: Condition  # of n

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, chosen: Tensor | slice) -> Noised:
        return Noised(self.z[chosen], self.t[chosen], self.condition[chosen])

    def to(self, device: torch.device) -> Noised:
        return Noised(self.z.to(device), self.t.to(device), self.condition.to(device))


@dataclass(frozen=True)
class NoisedAnew:
    """The same, made when it is asked for: of many large latents nothing is held."""

    latents: Latents
    objective: Objective
    seed: int
    stream: tuple[str | int, ...]  # that each sample's draws come from, beside its place

    def __len__(self) -> int:
        return len(self.latents.x)

    def __getitem__(self, chosen: Tensor | slice) -> Noised:
        places = torch.arange(len(self))[chosen] if isinstance(chosen, slice) else chosen
        sources = [generator(self.seed, *self.stream, place) for place in places.tolist()]
        x = self.latents.x[places]
        t = torch.cat([self.objective.draw_t(1, source) for source in sources])
        noise = torch.stack([torch.randn(x.shape[1:], generator=source) for source in sources])
        return Noised(self.objective.noised(x, t, noise), t, self.latents.condition[places])

    def again(self, number: int) -> NoisedAnew:
        """Return the same latents with the noise of another pass over them."""
        return replace(self, stream=(*self.stream, number))


def noised(latents: Latents, objective: Objective, draws: int, seed: int, stream: str) -> Noised:
    """Return each latent at `draws` timesteps with noise of its own; a sample's draws depend on its place alone."""
    t, noise = [], []
    for index in range(len(latents.x)):
        source = generator(seed, stream, index)
        t.append(objective.draw_t(draws, source))
        noise.append(torch.randn((draws, *latents.x.shape[1:]), generator=source))
    x, times = latents.tensor().repeat_interleave(draws, 0), torch.cat(t)
    repeated = torch.arange(len(latents.x)).repeat_interleave(draws)
    return Noised(objective.noised(x, times, torch.cat(noise)), times, latents.condition[repeated])
