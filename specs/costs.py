"""What a model costs, by formula, before anything exists: parameters, and FLOPs of one forward pass of one sample.

FLOPs are those of matrix products and convolutions, a multiply-add counting as two. A test holds these formulas to
what torch counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Protocol

from graftwork.specs.edits import Edit, Site
from graftwork.specs.operators import Mha, Mlp, OperatorSpec, Place, linear_parameters

FREQUENCIES = 256  # sinusoids that describe a timestep
ORIGINALS: dict[str, OperatorSpec] = {"mha": Mha(), "mlp": Mlp(ratio=4)}


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of a forward pass of one sample."""

    params: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.flops + other.flops)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.flops - other.flops)


NOTHING = Cost(0, 0)


def operator_cost(operator: OperatorSpec, place: Place) -> Cost:
    return Cost(operator.num_parameters(place), operator.flops(place))


class Shape(Protocol):
    """What a DiT's cost depends on beside its place: a spec has it, and so has a model."""

    @property
    def depth(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def learn_sigma(self) -> bool: ...


def rootstock_cost(model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
    """A DiT for latents of `channels` channels, with its own operators in every block (arXiv 2212.09748)."""
    width, patch = place.width, model.patch**2
    out = patch * channels * (2 if model.learn_sigma else 1)
    final = Cost(
        linear_parameters(width, out) + linear_parameters(width, 2 * width),
        2 * place.num_tokens * width * out + 4 * width**2,
    )
    return sum(
        (block_cost(place) for _ in range(model.depth)), embedding_cost(model, place, channels, num_classes) + final
    )


def embedding_cost(model: Shape, place: Place, channels: int, num_classes: int) -> Cost:
    """Of patches, timestep and label."""
    width, patch = place.width, model.patch**2
    return Cost(
        linear_parameters(channels * patch, width)
        + linear_parameters(FREQUENCIES, width)
        + linear_parameters(width, width)
        + (num_classes + 1) * width,
        2 * place.num_tokens * channels * patch * width + 2 * (FREQUENCIES + width) * width,
    )


def block_cost(place: Place) -> Cost:
    """One block: both operators and the modulation."""
    width = place.width
    modulation = Cost(linear_parameters(width, 6 * width), 12 * width**2)
    return sum((operator_cost(operator, place) for operator in ORIGINALS.values()), modulation)


@dataclass(frozen=True)
class GraftCost:
    """What a graft costs beside its rootstock."""

    rootstock: Cost
    graft: Cost
    replaced: Cost  # the operators that the edits take out
    scions: Cost  # what they put in; of a parallel block the merging projection, which replaces nothing


def graft_cost(rootstock: Cost, edits: Iterable[Edit], place: Place, carried: Iterable[Edit] = ()) -> GraftCost:
    """The cost of `rootstock` with `edits`; `carried` are the edits that its weights come with."""
    standing: dict[Site, Cost] = {}
    for edit in carried:
        cost = scion_cost(edit, place)
        rootstock += cost - _original(edit, place)
        standing[edit.site] = cost
    replaced = scions = NOTHING
    for edit in edits:
        replaced += standing.get(edit.site, _original(edit, place))
        scions += scion_cost(edit, place)
    return GraftCost(rootstock, rootstock + scions - replaced, replaced, scions)


BUDGET_TOLERANCE = 0.02  # by which a model's FLOPs may miss a budget, either way


PARTS = 2**20  # that the range of the totals is told apart in, where they are not multiples of some cost


def reachable(
    rootstock: Cost, original: Cost, options: Sequence[Cost], sites: int, wanted: float
) -> tuple[int, int, int]:
    """FLOPs of the models in which each of some like sites has its original or one of the options: the least, the most
    and the nearest to `wanted`."""
    changes = [0, *(option.flops - original.flops for option in options)]
    low, high = min(changes), max(changes)
    least, most = rootstock.flops + sites * low, rootstock.flops + sites * high
    unit = max(math.gcd(*(change - low for change in changes)), (most - least) // PARTS, 1)
    steps = {round((change - low) / unit) for change in changes}
    sums = 1  # bit i: whether the sites can come to i units above the least
    for _ in range(sites):
        sums = reduce(or_, (sums << step for step in steps))
    place = min(max(round((wanted - least) / unit), 0), sums.bit_length() - 1)
    below = (sums & ((2 << place) - 1)).bit_length() - 1
    rest = sums >> place
    above = place + (rest & -rest).bit_length() - 1
    nearest = min((least + below * unit, least + above * unit), key=lambda total: abs(total - wanted))
    return least, most, nearest


def scion_cost(edit: Edit, place: Place) -> Cost:
    """What the scion costs; of a parallel block, the merging projection, since its branches were there before."""
    if isinstance(edit.operator, OperatorSpec):
        return operator_cost(edit.operator, place)
    return Cost(linear_parameters(2 * place.width, place.width), 4 * place.num_tokens * place.width**2)


def _original(edit: Edit, place: Place) -> Cost:
    return operator_cost(ORIGINALS[edit.site.target], place) if edit.site.target in ORIGINALS else NOTHING
