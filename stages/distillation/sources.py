"""Where a distillation step's activations come from: memory, or passes made anew; `choose_source` says which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graftwork.cluster.machine import available_memory, num_cpus, num_gpus
from graftwork.specs.edits import Site
from graftwork.specs.resources import StepResources
from graftwork.stages.artifacts.latents import Noised, NoisedAnew
from graftwork.stages.catalog.distill import DistillParams
from graftwork.stages.contract import Context
from graftwork.stages.distillation.activations import Capture, Pairs, Teacher, joined, read_teacher
from graftwork.stages.training.batches import DrawnAhead

MEMORY_SHARE = 0.5  # of this task's memory, for activations
TASK_STATE = "activations"  # the name under which a task keeps its state from step to step


class Source(Protocol):
    """Where batches of pairs come from."""

    def __len__(self) -> int: ...

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Pairs]:
        """All pairs on the device, `size` at a time; order: (n,) indices, else as they are."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Pairs in memory: the device's, or the host's, from where batches are moved."""

    pairs: Pairs
    device: torch.device

    def __len__(self) -> int:
        return len(self.pairs)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Pairs]:
        if self.pairs.outputs.device.type != self.device.type:  # a GPU in use has a number, too
            yield from self._uploaded(size, order)
        elif order is None:
            yield from self.pairs.split(size)
        else:
            for part in order.to(self.device).split(size):
                yield self.pairs.of([value[part] for value in self.pairs.tensors()])

    def _uploaded(self, size: int, order: Tensor | None) -> Iterator[Pairs]:
        """The same from the host's memory: a thread gathers the next batches where a GPU copies them from by itself."""
        batches = (torch.arange(len(self)) if order is None else order.cpu()).split(size)

        def gather(number: int) -> Pairs:
            return self.pairs.of([_gathered(value, batches[number]) for value in self.pairs.tensors()])

        with DrawnAhead(gather, range(len(batches))) as gathered:
            for _, batch in gathered:
                yield batch.of([value.to(self.device, non_blocking=True) for value in batch.tensors()])


@dataclass(frozen=True)
class Recomputed:
    """A source that stores nothing: it runs the teacher again for each chunk of the batches."""

    teacher: Teacher
    site: Site
    latents: Noised | NoisedAnew
    chunk: int  # samples whose activations are held at once

    def __len__(self) -> int:
        return len(self.latents)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Pairs]:
        whole = torch.arange(len(self)) if order is None else order.cpu()
        for part in whole.split(max(self.chunk // size, 1) * size):
            captured = self.teacher.capture([self.site], self.latents[part], self.teacher.device)
            yield from InMemory(captured[self.site], self.teacher.device).batches(size)


@dataclass
class TaskState:
    """What the steps of one task share: the teacher, and the pairs of sites whose step is still to come."""

    identity: tuple[object, ...]  # of steps that can share it
    teacher: Teacher
    pairs: dict[Site, tuple[InMemory, InMemory]]  # to train on, and held-out


def task_state(context: Context) -> TaskState:
    """Return the state of the step's task; the first step of the task loads the teacher."""
    params: DistillParams = context.params
    identity = (context.inputs["base"].key, context.inputs["features"].key, params.seed, params.recipe)
    state: TaskState | None = context.task_scope.state.get(TASK_STATE)
    if state is None or state.identity != identity:
        teacher = read_teacher(params, context.inputs, context.device, context.stopping)
        state = TaskState(identity, teacher, {})
        context.task_scope.state[TASK_STATE] = state
    return state


def choose_source(task: TaskState, context: Context) -> tuple[Source, Source]:
    """Return the pairs of the step's site: those to train on, and the held-out ones. Raises Stopped.

    They come from a pass that an earlier step of this task made, or from passes that earlier tasks made, or from one
    that this step makes: on the device, or else on the host. What fits neither is computed anew in each epoch.
    """
    params: DistillParams = context.params
    site, teacher = params.edit.site, task.teacher
    if site in task.pairs:
        return _pairs_of(task, context)

    needed = teacher.num_samples * teacher.bytes_a_sample(site)
    room, place = memory_budget(context, teacher.device), teacher.device
    if needed <= room:
        fetched = _captured_by_tasks(context, teacher.device)
        if fetched is not None:
            return fetched
    elif place.type != "cpu":
        room, place = memory_budget(context, torch.device("cpu")), torch.device("cpu")

    if needed <= room:
        task.pairs |= _captured_now(teacher, _sites_ahead(context), room, place)
        return _pairs_of(task, context)

    return recomputed(task, context, teacher.train), recomputed(task, context, teacher.heldout)


def _pairs_of(task: TaskState, context: Context) -> tuple[InMemory, InMemory]:
    """Return the pairs of the step's site; they are let go of unless another scion of the task is for that site."""
    first, *ahead = _sites_ahead(context)
    return task.pairs[first] if first in ahead else task.pairs.pop(first)


def recomputed(task: TaskState, context: Context, latents: Noised | NoisedAnew) -> Recomputed:
    """Return the pairs of the step's site, computed anew whenever they are asked for."""
    params: DistillParams = context.params
    site, teacher = params.edit.site, task.teacher
    # A chunk lives until the last batch of it is used, and by then the next one is being captured.
    chunk = max(memory_budget(context, teacher.device) // (2 * teacher.bytes_a_sample(site)), 1)
    return Recomputed(teacher, site, latents, chunk)


def memory_budget(context: Context, place: torch.device) -> int:
    """Return the bytes of activations that this task may hold on a device, or on the host."""
    params: DistillParams = context.params
    if params.recipe.activations is not None:
        return int(params.recipe.activations)
    return memory_share(context.resources, place)


def memory_share(resources: StepResources, place: torch.device) -> int:
    """Return the bytes that a task may fill with activations on a device, or on the host, unless a job says."""
    if place.type == "cuda":
        return int(MEMORY_SHARE * gpu_memory(place, resources.gpu))
    if resources.memory is not None:
        return int(MEMORY_SHARE * resources.memory)
    # What such tasks there can be beside this one is settled by the GPUs, if it takes any.
    neighbours = num_gpus() / resources.gpu if resources.gpu else num_cpus() / max(resources.cpu, 1.0)
    return int(MEMORY_SHARE * available_memory() / max(neighbours, 1.0))


def gpu_memory(device: torch.device, share: float) -> float:
    """Return the bytes of a GPU that a task with a share of it may take: of the whole card, if so many are free.

    What PyTorch caches for this process counts as free, which the driver counts as taken.
    """
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(min(share or 1.0, 1.0) * total, free + cached)


def _captured_by_tasks(context: Context, device: torch.device) -> tuple[InMemory, InMemory] | None:
    """Return what earlier tasks captured for the step's site; None if none was to, or a part was lost."""
    if context.task_scope.recorded is None:
        return None
    captures: Sequence[Capture | None] = context.task_scope.recorded()
    whole = [one for one in captures if one is not None]
    if not whole or len(whole) < len(captures):
        return None
    train, heldout = (joined([one[half] for one in whole]) for half in (0, 1))
    return InMemory(train, device), InMemory(heldout, device)


def _captured_now(
    teacher: Teacher, sites: Sequence[Site], room: int, place: torch.device
) -> dict[Site, tuple[InMemory, InMemory]]:
    """Make one pass for as many of the sites, in their order, as fit so many bytes at a place."""
    sites = [*dict.fromkeys(sites)]
    needed = [teacher.num_samples * teacher.bytes_a_sample(site) for site in sites]
    fitting = [site for number, site in enumerate(sites) if sum(needed[: number + 1]) <= room]
    train, heldout = (teacher.capture(fitting, latents, place) for latents in (teacher.train, teacher.heldout))
    return {site: (InMemory(train[site], teacher.device), InMemory(heldout[site], teacher.device)) for site in fitting}


def _sites_ahead(context: Context) -> list[Site]:
    """Return the step's own site, and those of the steps of the same job that come after it in the task."""
    mine: DistillParams = context.params
    others = [other for other in context.task_scope.next if (other.seed, other.recipe) == (mine.seed, mine.recipe)]
    return [params.edit.site for params in (mine, *others)]


def _gathered(values: Tensor, chosen: Tensor) -> Tensor:
    """Some rows of a tensor of the host, in memory that is pinned if there is a GPU.

    PyTorch gives such memory to nobody else before the copies from it are over.
    """
    room = torch.empty((len(chosen), *values.shape[1:]), dtype=values.dtype, pin_memory=torch.cuda.is_available())
    return torch.index_select(values, 0, chosen, out=room)
