"""What a training step learns from: latents with their timesteps, conditions and noise, drawn while earlier steps run.

Every draw belongs to a step number, and noise to a place in that step's batch, of which each worker draws its slice.
Which batch a step gets thus depends neither on how many workers there are nor on when it was drawn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from graftwork.models.condition import Condition, Conditioner, Texts
from graftwork.models.numerics.streams import generator
from graftwork.models.objectives import Objective
from graftwork.models.rootstocks import RootstockConfig
from graftwork.specs.training import TrainingSpec
from graftwork.stages.artifacts.latents import Latents, Shards, either

DEPTH = 2  # batches that are drawn ahead
T = TypeVar("T")  # a batch of whatever kind


@dataclass(frozen=True)
class TrainingSet:
    """Latents and conditions to train on, mapped from a file or in memory; a batch of them is moved to `device`."""

    latents: Tensor | Shards  # (n,C,..)
    condition: Condition  # of all n
    conditioner: Conditioner
    objective: Objective
    device: torch.device
    mirrored: Tensor | Shards | None = None  # like latents, of each image's mirror image
    texts: Texts | None = None  # by which labels are those of texts

    @classmethod
    def of(
        cls, latents: Latents, config: RootstockConfig, device: torch.device, texts: Texts | None = None
    ) -> TrainingSet:
        """Return what a model of that config learns from these latents on a device."""
        return cls(latents.x, latents.condition, config.conditioner, config.objective, device, latents.mirrored, texts)

    def pick(self, chosen: Tensor, mirror: Tensor) -> Tensor:
        """The chosen latents (B,C,..); where there are mirror images, `mirror` (B,) says which of the two each is."""
        if self.mirrored is None:
            return self.latents[chosen]
        return either(self.latents, self.mirrored, chosen, mirror)


class Batch(NamedTuple):
    """A worker's slice of a step's batch."""

    x: Tensor  # (B,C,..) latents
    t: Tensor  # (B,) timesteps
    condition: Condition  # of B, some dropped
    noise: Tensor  # (B,C,..)

    def cut(self, places: slice) -> Batch:
        """Return some of its samples."""
        return Batch(self.x[places], self.t[places], self.condition[places], self.noise[places])

    def pinned(self) -> Batch:
        """In memory from which a GPU copies while the host goes on."""
        return Batch(self.x.pin_memory(), self.t.pin_memory(), self.condition.pin_memory(), self.noise.pin_memory())

    def to(self, device: torch.device) -> Batch:
        x, t, noise = (part.to(device, non_blocking=True) for part in (self.x, self.t, self.noise))
        return Batch(x, t, self.condition.to(device, non_blocking=True), noise)


def share_of(batch: int, rank: int, workers: int) -> range:
    """The places in a batch that are a worker's; shares differ by one sample at most."""
    return range(rank * batch // workers, (rank + 1) * batch // workers)


def draw_batch(
    data: TrainingSet, recipe: TrainingSpec, seed: int, stream: str, step: int, rank: int, workers: int
) -> Batch:
    """This worker's slice of a step's batch, in main memory."""
    draws, batch = generator(seed, stream, "step", step), recipe.batch
    t = data.objective.draw_t(batch, draws)
    dropped = torch.rand(batch, generator=draws) < recipe.dropout
    chosen = shuffled(len(data.latents), step * batch, batch, seed, stream)
    places = share_of(batch, rank, workers)
    share = slice(places.start, places.stop)
    noise = torch.empty((len(places), *data.latents.shape[1:]))
    for row, place in zip(noise, places, strict=True):
        row.normal_(generator=generator(seed, stream, "noise", step, place))
    # From a stream of its own, so that all else is drawn the same where there are no mirror images.
    mirror = torch.rand(batch, generator=generator(seed, stream, "mirror", step)) < 0.5
    condition = data.conditioner.drop(data.condition[chosen[share]], dropped[share])
    if data.texts is not None:  # read here, ahead of the step
        condition = data.texts(condition)
    return Batch(data.pick(chosen[share], mirror[share]), t[share], condition, noise)


class DrawnAhead(Generic[T]):
    """`draw(step)` of each step, in order; the next ones are drawn on a thread of their own meanwhile.

    A context, after which that thread is gone. What `draw` raises is raised here, at its step.
    """

    def __init__(self, draw: Callable[[int], T], steps: range) -> None:
        self.draw, self.steps = draw, steps
        self.waited, self.waited_since = 0.0, time.perf_counter()  # seconds of waiting, and since when
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, T]]:
        coming = deque(self.thread.submit(self.draw, step) for step in self.steps[:DEPTH])
        for step in self.steps:
            began = time.perf_counter()
            batch = coming.popleft().result()
            self.waited += time.perf_counter() - began
            if step + DEPTH in self.steps:
                coming.append(self.thread.submit(self.draw, step + DEPTH))
            yield step, batch

    def share_waited(self) -> float:
        """The share of the time, since it was last asked for, in which whoever iterates waited for a batch."""
        now = time.perf_counter()
        share = self.waited / (now - self.waited_since)
        self.waited, self.waited_since = 0.0, now
        return share


def shuffled(size: int, start: int, count: int, seed: int, stream: str) -> Tensor:
    """Entries start .. start + count of an endless sequence of permutations of `size` items, one an epoch."""
    picks = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        order = _order(size, epoch, seed, stream)
        picks.append(order[max(0, start - epoch * size) : start + count - epoch * size])
    return torch.cat(picks)


@lru_cache(maxsize=2)  # a batch may lie across the end of an epoch
def _order(size: int, epoch: int, seed: int, stream: str) -> Tensor:
    return torch.randperm(size, generator=generator(seed, stream, "epoch", epoch))
