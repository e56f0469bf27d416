"""Surgery: look at what stands in a site, put another thing in its place, watch what goes in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from graftwork.models.condition import Condition
from graftwork.models.numerics.streams import initialising
from graftwork.models.operators import REGISTRY, build_operator
from graftwork.models.rootstocks import Rootstock, Stream
from graftwork.models.rootstocks.parallel import Absorbed, ParallelBlock
from graftwork.specs.edits import Edit, Parallel, Site

R = TypeVar("R", bound=Rootstock)


def scion_at(model: Rootstock, site: Site) -> nn.Module:
    """The operator in a site, or the parallel block."""
    if site.target == "pair":
        return model.blocks[site.block]
    return model.slot(site).operator


def replace(model: Rootstock, site: Site, scion: nn.Module) -> None:
    if site.target == "pair":
        model.blocks[site.block], model.blocks[site.block + 1] = scion, Absorbed()
    else:
        model.slot(site).fill(scion)


def new_scion(model: Rootstock, edit: Edit, seed: int) -> nn.Module:
    """A fresh scion for the edit; the same seed gives the same weights wherever it is made.

    An operator is initialised; a parallel block is made of the model's own two blocks.
    """
    site, config = edit.site, model.config
    if isinstance(edit.operator, Parallel):
        return ParallelBlock(model.blocks[site.block], model.blocks[site.block + 1], config.width)
    with initialising(seed, "scion", str(site)):
        return build_operator(edit.operator, config.place)


def inheritance(scion: nn.Module, edit: Edit, original: nn.Module) -> dict[str, Tensor]:
    """Return what a scion can begin with of the operator that it replaces, by the names of the scion's tensors.

    A layer is taken whole, if each tensor of it has a counterpart of its shape. A parallel block has the weights of its
    blocks in any case.
    """
    if isinstance(edit.operator, Parallel):
        return {}
    theirs, tensors = original.state_dict(), dict[str, Tensor]()
    for layer, source in REGISTRY[type(edit.operator)].inherits.items():
        shapes = {name: value.shape for name, value in scion.state_dict().items() if name.startswith(f"{layer}.")}
        values = {name: theirs.get(source + name.removeprefix(layer)) for name in shapes}
        fitting = {name: value for name, value in values.items() if value is not None and value.shape == shapes[name]}
        if len(fitting) == len(shapes):
            tensors |= fitting
    return tensors


def graft(model: R, edits: Iterable[Edit], seed: int) -> R:
    """Put a fresh scion into each edit's site, in place; parallel blocks take in what is there by then."""
    for edit in sorted(edits, key=Edit.sort_key):
        replace(model, edit.site, new_scion(model, edit, seed))
    return model


def all_edits(before: Iterable[Edit], after: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits that a model carries once `after` is made on one that carries `before`: the last one at a site."""
    merged = {edit.site: edit for edit in (*before, *after)}
    return tuple(sorted(merged.values(), key=Edit.sort_key))


def alike(one: Edit, other: Edit) -> bool:
    """Whether both put the same operator there, whatever kernel computes it."""
    return one.operator.model_copy(update={"backend": "auto"}) == other.operator.model_copy(update={"backend": "auto"})


@dataclass(frozen=True)
class Observation:
    """What a scion in the site would see, and what it has to answer: see `answer`."""

    inputs: tuple[Tensor, ...]  # an operator's (B,N,D), after norm and modulation; a pair's stream and what blocks get
    output: Tensor  # (B,N,D), before the gate; of a pair, what its blocks add to the stream
    gate: Tensor | None  # (B,D); a pair has none


def answer(scion: nn.Module) -> Callable[..., Tensor]:
    """The function of an observation's inputs that is distilled."""
    return scion.update if isinstance(scion, ParallelBlock) else scion


@torch.no_grad()
def observe(
    model: Rootstock, sites: Iterable[Site], x: Tensor, t: Tensor, condition: Condition | Tensor
) -> dict[Site, Observation]:
    """Run the model up to the last site's block, and return each site's inputs, output and gate."""
    sites = tuple(sites)
    found = dict(observing(model, sites, x, t, condition))
    return {site: found[site] for site in sites}


@torch.no_grad()
def observing(
    model: Rootstock, sites: Iterable[Site], x: Tensor, t: Tensor, condition: Condition | Tensor
) -> Iterator[tuple[Site, Observation]]:
    """Run the model up to the last site's block; yield what each site saw and put out once its block is passed.

    What was yielded is not kept. Who asks for the next may learn from it in between: that is outside of `no_grad`.
    """
    leaving: dict[int, list[Site]] = {}  # by the block behind which they are known
    for site in dict.fromkeys(sites):  # several scions may be for one
        leaving.setdefault(site.block + (site.target == "pair"), []).append(site)
    boundaries = {site.block for sites in leaving.values() for site in sites if site.target == "pair"}
    calls: dict[Site, tuple[Tensor, Tensor]] = {}
    hooks = [
        scion_at(model, site).register_forward_hook(
            lambda _, args, output, site=site: calls.__setitem__(site, (args[0], output))
        )
        for sites in leaving.values()
        for site in sites
        if site.target != "pair"
    ]
    streams: dict[int, Stream] = {}  # before the block of that number
    try:
        stream = model.start(x, t, condition)
        for index in range(1 + max(leaving)):
            if index in boundaries:
                streams[index] = stream
            stream = model.through(index, stream)
            for site in leaving.get(index, ()):
                if site.target == "pair":
                    yield site, _of_pair(streams.pop(site.block), stream)
                else:
                    (inputs, output), gate = calls.pop(site), model.slot(site).gate
                    yield site, Observation((inputs,), output, None if gate is None else gate(stream))
    finally:
        for hook in hooks:
            hook.remove()


def _of_pair(before: Stream, after: Stream) -> Observation:
    return Observation((before.tokens, *before.conditioning), after.tokens - before.tokens, None)
