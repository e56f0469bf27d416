"""Activations: what operators of the rootstock saw and put out. They go straight into memory, never to a disk.

Sites share passes of the rootstock. Where tasks made one for all of them together, each of some samples (`record`), a
site puts its parts together. Else the first site of a task has its pass record those after it too, as many as fit the
memory, and a site's activations go when the site is through. Those of a site that does not fit by itself are kept on
the host, or else computed anew in each epoch, chunk by chunk of its order.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.cluster.machine import available_memory, num_cpus, num_gpus
from graftwork.models import checkpoints
from graftwork.models.numerics.precision import computing
from graftwork.models.rootstocks.dit import DiT
from graftwork.models.surgery import observe
from graftwork.specs.edits import Edit, Site, overlapping
from graftwork.specs.params import DistillParams
from graftwork.specs.training import DistillSpec
from graftwork.stages.artifacts.latents import Noised, noised, read, require_enough
from graftwork.stages.contract import Context, Input, Portion, Stopped, never
from graftwork.stages.training.batches import DrawnAhead

BATCH = 64  # samples that pass through the rootstock together
SHARE = 0.5  # of the memory that is this task's
KEPT = "activations"  # under which name a task keeps them from step to step


@dataclass(frozen=True)
class Pairs:
    """What an operator saw and put out, and the weight of its error."""

    inputs: tuple[Tensor, ...]  # each (n,..): an operator's tokens; a pair's tokens and condition
    outputs: Tensor  # (n,N,D)
    weights: Tensor | None  # (n,1,D), or all ones

    def __len__(self) -> int:
        return len(self.outputs)

    def tensors(self) -> list[Tensor]:
        return [*self.inputs, self.outputs, *([] if self.weights is None else [self.weights])]

    def of(self, tensors: Sequence[Tensor]) -> Pairs:
        """Others in the place of its tensors."""
        inputs = tuple(tensors[: len(self.inputs)])
        return Pairs(inputs, tensors[len(inputs)], None if self.weights is None else tensors[len(inputs) + 1])

    def split(self, size: int) -> Iterator[Pairs]:
        """Views of `size` samples each."""
        return map(self.of, zip(*(value.split(size) for value in self.tensors()), strict=True))

    def __reduce__(self) -> tuple[Callable[..., Pairs], tuple[Any, ...]]:
        """As arrays, which Ray hands from process to process without a copy; they are read-only there."""
        values = [(value.dtype, value.cpu().view(torch.uint8).numpy()) for value in self.tensors()]
        return _unpickled, (len(self.inputs), self.weights is not None, values)


def _unpickled(inputs: int, weighted: bool, values: Sequence[tuple[torch.dtype, NDArray[Any]]]) -> Pairs:
    with warnings.catch_warnings(action="ignore"):  # of their being read-only
        tensors = [torch.from_numpy(value).view(dtype) for dtype, value in values]
    return Pairs(tuple(tensors[:inputs]), tensors[inputs], tensors[inputs + 1] if weighted else None)


def joined(found: Sequence[Pairs | None]) -> Pairs:
    """The pairs of all parts that have any, in their order, as tensors of their own."""
    parts = [part for part in found if part is not None]
    return parts[0].of([torch.cat(values) for values in zip(*(part.tensors() for part in parts), strict=True)])


class Source(Protocol):
    """Where batches of pairs come from."""

    def __len__(self) -> int: ...

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Pairs]:
        """All pairs on the device, `size` at a time; order: (n,) indices, else as they are."""
        ...


@dataclass(frozen=True)
class Kept:
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
        parts = (torch.arange(len(self)) if order is None else order.cpu()).split(size)

        def gather(number: int) -> Pairs:
            return self.pairs.of([_gathered(value, parts[number]) for value in self.pairs.tensors()])

        with DrawnAhead(gather, range(len(parts))) as gathered:
            for _, batch in gathered:
                yield batch.of([value.to(self.device, non_blocking=True) for value in batch.tensors()])


@dataclass(frozen=True)
class Recomputed:
    """Pairs that are nowhere: the rootstock runs again for each chunk of what is asked for."""

    rootstock: Rootstock
    site: Site
    shown: Noised
    chunk: int  # samples whose activations are held at once

    def __len__(self) -> int:
        return len(self.shown.t)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[Pairs]:
        whole = torch.arange(len(self)) if order is None else order.cpu()
        for part in whole.split(max(self.chunk // size, 1) * size):
            found = self.rootstock.record([self.site], self.shown[part], self.rootstock.device)
            yield from Kept(found[self.site], self.rootstock.device).batches(size)


@dataclass(frozen=True)
class Rootstock:
    """The pretrained model, and the noised latents that it is shown: the same ones for every site."""

    model: DiT
    carried: tuple[Edit, ...]
    shown: Noised
    unseen: Noised  # held-out
    recipe: DistillSpec
    device: torch.device
    stopping: Callable[[], bool] = never

    def require_free(self, edit: Edit) -> None:
        if overlapping(self.carried, [edit]):
            raise ValueError(f"{edit.site}: one of its blocks is in a parallel block of the rootstock already")

    def bytes_a_sample(self, site: Site) -> int:
        """What one sample's pair at a site takes."""
        place = self.model.config.place
        return 2 * place.num_tokens * place.width * kept_as(site, self.recipe).itemsize

    def record(self, sites: Sequence[Site], shown: Noised, place: torch.device) -> dict[Site, Pairs]:
        """One pass, no further than the last site's block; what is seen is kept at `place`. Raises Stopped."""
        found: dict[Site, Pairs] = {}
        for start in range(0, len(shown.t), BATCH):
            if self.stopping():
                raise Stopped(f"after {start} samples of the rootstock's pass")
            part = slice(start, start + BATCH)
            with computing(self.recipe.precision, self.device):
                noisy = shown[part].to(self.device)
                seen = observe(self.model, sites, noisy.z, noisy.t, noisy.condition)
            for site, one in seen.items():
                kept = kept_as(site, self.recipe)
                weighted = self.recipe.gate_weighted and one.gate is not None
                weights = one.gate.abs()[:, None] if weighted and one.gate is not None else None
                batch = Pairs(tuple(value.to(kept) for value in one.inputs), one.output.to(kept), weights)
                if site not in found:
                    found[site] = batch.of([_room_for(len(shown.t), value, place) for value in batch.tensors()])
                for whole, value in zip(found[site].tensors(), batch.tensors(), strict=True):
                    whole[part].copy_(value, non_blocking=True)
        if place != self.device:
            torch.cuda.synchronize()
        return found


def read_rootstock(
    params: DistillParams, inputs: Mapping[str, Input], device: torch.device, stopping: Callable[[], bool]
) -> Rootstock:
    recipe, features = params.recipe, inputs["features"].path()
    model, carried = checkpoints.load(inputs["base"].path())
    objective = model.config.objective
    training, heldout = read(features, "training"), read(features, "heldout")
    require_enough("distill.samples", recipe.samples, len(training.x), "training")
    require_enough("distill.heldout", recipe.heldout or 0, len(heldout.x), "held-out")
    return Rootstock(
        model.to(device),
        tuple(carried),
        noised(training.stratified(recipe.samples), objective, recipe.draws, params.seed, "distill"),
        noised(heldout.stratified(recipe.heldout or recipe.samples), objective, 1, params.seed, "distill/heldout"),
        recipe,
        device,
        stopping,
    )


# Of a site: what it saw of some samples to learn from, and of some held-out ones; None where a part has none of them.
Recording = tuple[Pairs | None, Pairs | None]


def record(portion: Portion) -> list[Recording]:
    """What the sites of distillations see of a part of the samples. Raises Stopped."""
    steps: Sequence[DistillParams] = portion.steps
    rootstock = read_rootstock(steps[0], portion.inputs, portion.device, portion.stopping)
    sites = [step.edit.site for step in steps]

    def of(samples: Noised) -> dict[Site, Pairs]:
        chosen = _part_of(len(samples.t), portion.part, portion.parts)
        return rootstock.record(sites, samples[chosen], portion.device)

    shown, unseen = of(rootstock.shown), of(rootstock.unseen)
    return [(shown.get(site), unseen.get(site)) for site in sites]


def _part_of(count: int, part: int, parts: int) -> slice:
    """Whole batches, so that a sample passes with the same others whatever the number of parts."""
    batches = math.ceil(count / BATCH)
    begin, end = (BATCH * (batches * number // parts) for number in (part, part + 1))
    return slice(begin, min(end, count))


def _room_for(count: int, like: Tensor, place: torch.device) -> Tensor:
    return torch.empty((count, *like.shape[1:]), dtype=like.dtype, device=place)


def _gathered(values: Tensor, chosen: Tensor) -> Tensor:
    """Some rows of a tensor of the host, in memory that is pinned if there is a GPU.

    PyTorch gives such memory to nobody else before the copies from it are over.
    """
    room = torch.empty((len(chosen), *values.shape[1:]), dtype=values.dtype, pin_memory=torch.cuda.is_available())
    return torch.index_select(values, 0, chosen, out=room)


def kept_as(site: Site, recipe: DistillSpec) -> torch.dtype:
    """Operators begin with a product of matrices, which in bf16 sees no more of its input; a pair adds to its own."""
    return torch.bfloat16 if recipe.precision == "bf16" and site.target != "pair" else torch.float32


@dataclass
class Shared:
    """What the task keeps: the rootstock, and the pairs of sites whose turn has not come, by site."""

    identity: tuple[object, ...]
    rootstock: Rootstock
    pairs: dict[Site, tuple[Kept, Kept]]


def shared(context: Context) -> Rootstock:
    """The rootstock of the step, loaded by the first step of the task."""
    return _shared(context).rootstock


def activations(context: Context) -> tuple[Source, Source]:
    """The pairs of the step's site: those to learn from, and the held-out ones."""
    params: DistillParams = context.params
    task, site = _shared(context), params.edit.site
    if site not in task.pairs:
        found = _handed_over(task.rootstock, site, context) or _recorded(task.rootstock, _sites_ahead(context), context)
        if not found:
            return _streamed(task.rootstock, site, context)
        task.pairs |= found
    return task.pairs.pop(site)


def _shared(context: Context) -> Shared:
    kept = context.together.kept.get(KEPT)
    if kept is None or kept.identity != _identity(context, context.params):
        kept = Shared(_identity(context, context.params), _read(context), {})
        context.together.kept[KEPT] = kept
    return kept


def _read(context: Context) -> Rootstock:
    return read_rootstock(context.params, context.inputs, context.device, context.stopping)


def _identity(context: Context, params: DistillParams) -> tuple[object, ...]:
    return (context.inputs["base"].key, context.inputs["features"].key, params.seed, params.recipe)


def _sites_ahead(context: Context) -> list[Site]:
    """The step's own site and those that come after it in the task, of the same job."""
    mine: DistillParams = context.params
    ahead = [
        mine,
        *(other for other in context.together.next if (other.seed, other.recipe) == (mine.seed, mine.recipe)),
    ]
    return [params.edit.site for params in ahead]


def _handed_over(rootstock: Rootstock, site: Site, context: Context) -> dict[Site, tuple[Kept, Kept]]:
    """What other tasks recorded for the site, where that was asked of them, they could, and it fits."""
    needed = _samples(rootstock) * rootstock.bytes_a_sample(site)
    if context.together.recorded is None or needed > _room(context, rootstock.device):
        return {}
    parts: Sequence[Recording | None] = context.together.recorded()
    if not parts or any(part is None for part in parts):
        return {}
    shown, unseen = (joined([part[half] for part in parts if part is not None]) for half in (0, 1))
    return {site: (Kept(shown, rootstock.device), Kept(unseen, rootstock.device))}


def _recorded(rootstock: Rootstock, sites: Sequence[Site], context: Context) -> dict[Site, tuple[Kept, Kept]]:
    """One pass for as many of the sites, in their order, as fit the device, or else the first on the host."""
    device = rootstock.device
    needed = [_samples(rootstock) * rootstock.bytes_a_sample(site) for site in sites]
    room, place = _room(context, device), device
    if needed[0] > room and device.type != "cpu":
        room, place = _room(context, torch.device("cpu")), torch.device("cpu")
    fitting = [site for number, site in enumerate(sites) if sum(needed[: number + 1]) <= room]
    if not fitting:
        return {}
    shown, unseen = (rootstock.record(fitting, part, place) for part in (rootstock.shown, rootstock.unseen))
    return {site: (Kept(shown[site], device), Kept(unseen[site], device)) for site in fitting}


def _samples(rootstock: Rootstock) -> int:
    return len(rootstock.shown.t) + len(rootstock.unseen.t)


def _streamed(rootstock: Rootstock, site: Site, context: Context) -> tuple[Source, Source]:
    # A chunk lives until the last batch of it is used, and by then the next one is being recorded.
    chunk = max(_room(context, rootstock.device) // (2 * rootstock.bytes_a_sample(site)), 1)
    shown, unseen = (Recomputed(rootstock, site, part, chunk) for part in (rootstock.shown, rootstock.unseen))
    return shown, unseen


def _room(context: Context, place: torch.device) -> int:
    """Bytes of activations that this task may hold there."""
    params: DistillParams = context.params
    if params.recipe.activations is not None:
        return int(params.recipe.activations)
    if place.type == "cuda":
        return int(SHARE * memory_of_gpu(place, context.resources.gpu))
    if context.resources.memory is not None:
        return int(SHARE * context.resources.memory)
    if context.resources.gpu:  # what such tasks there can be beside this one is settled by the GPUs
        neighbours = num_gpus() / context.resources.gpu
    else:
        neighbours = num_cpus() / max(context.resources.cpu, 1.0)
    return int(SHARE * available_memory() / max(neighbours, 1.0))


def memory_of_gpu(device: torch.device, share: float) -> float:
    """Return the bytes of a GPU that a task with a share of it may take: of the whole card, if so many are free.

    What PyTorch caches for this process counts as free, which the driver counts as taken.
    """
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(min(share or 1.0, 1.0) * total, free + cached)
